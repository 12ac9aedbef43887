"""Write a perturbed checkpoint into a folder; write it again from its recipe; check it against its recipe."""
