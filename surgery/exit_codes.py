"""The exit codes of `surgery`, for scripts that ask what became of it."""

FAILED = 1
"""An error, which is on stderr in one line; of `surgery verify`, also a checkpoint that differs."""

USAGE = 2
"""Options or arguments that cannot be used, as click has it; of `surgery run`, any error of its own."""

INACTIVE = 3
"""Of `surgery run`: the command succeeded, but a regularizer had no effect."""

INTERRUPTED = 130
"""Ctrl-C, as a shell reports it: 128 and SIGINT's number."""
