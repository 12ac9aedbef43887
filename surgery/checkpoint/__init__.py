"""Read checkpoints: which files there are, and the tensors in them, on this machine or on the Hub."""
