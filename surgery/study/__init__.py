"""`surgery study`: run a user's own command over arms and seeds, and say what can be said of the difference."""
