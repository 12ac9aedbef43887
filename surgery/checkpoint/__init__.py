"""Read checkpoints: what files there are, what is in them, on this machine or on the Hub."""
