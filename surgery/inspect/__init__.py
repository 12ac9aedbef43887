"""Read checkpoints to report on them: what one holds (inspect), how two differ (diff)."""
