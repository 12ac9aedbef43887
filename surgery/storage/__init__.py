"""Object stores by fsspec URLs: what is read by ranges, written whole or not at all, and locked."""
