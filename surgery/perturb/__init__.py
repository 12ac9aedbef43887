"""Write a perturbed checkpoint, and later write it again or check it."""
