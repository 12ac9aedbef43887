"""What runs inside the processes of a command that `surgery run` has started, beside the user's script."""
