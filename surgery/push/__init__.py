"""Put a perturbed checkpoint on the Hub."""
