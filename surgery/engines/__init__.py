"""Where jobs run: on this machine, on a Ray cluster, or under Slurm. A job is a command with a folder of its own."""

ENGINES = ("local", "ray", "slurm")
"""By the names that --engine calls them."""
