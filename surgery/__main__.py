"""The process of the command line: of the script `surgery`, and of `python -m surgery`."""

import os
import sys

try:
    from surgery import interrupts
except KeyboardInterrupt:  # in the milliseconds before it can answer by itself, in its words
    os.write(2, b"interrupted: run the same command again.\n")
    os._exit(130)


def main() -> None:
    """Run the command line to the end of this process, with Ctrl-C and what is printed under control."""
    interrupts.install(sys.argv[1:])
    from surgery.cli import main as command
    from surgery.cli.streams import guard_streams

    guard_streams()
    try:
        command(prog_name="surgery")
    except SystemExit:
        interrupts.leave()
        raise
    except BaseException:
        if interrupts.has_raised():  # and a library has made another error of it
            interrupts.end()
        raise


if __name__ == "__main__":
    main()
