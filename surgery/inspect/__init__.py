"""Read checkpoints to report on them: what one holds, how two differ."""
