"""What scripts may rely on: the exit codes of `surgery`, and the version of the JSON that it prints."""

FAILED = 1
"""An error, which is on stderr in one line."""

DIFFERS = 1
"""Of `surgery verify`: the checkpoint is not what its recipe says. Its errors are UNVERIFIED."""

USAGE = 2
"""Options or arguments that cannot be used, as click has it; of `surgery run` and `env`, any error of their own."""

INACTIVE = 3
"""Of `surgery run`: the command succeeded, but a regularizer had no effect."""

UNVERIFIED = 4
"""Of `surgery verify`: an error, so that it is not known whether the checkpoint differs."""

INTERRUPTED = 130
"""Ctrl-C, as a shell reports it: 128 and SIGINT's number."""

JSON_VERSION = 1
"""Of the shape of every JSON object printed: a key that is renamed, dropped or given another meaning raises it."""
