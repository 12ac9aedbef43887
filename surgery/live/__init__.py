"""Perturb a torch model or a state_dict in memory, with the bits that its perturbed checkpoint would have."""
