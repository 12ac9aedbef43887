"""Perturb a model or a state_dict in memory."""
