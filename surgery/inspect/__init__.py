"""Look at checkpoints: what one holds, and how two differ."""
