"""`python -m surgery`: the same command line as the script `surgery`."""

from surgery.cli import main

if __name__ == "__main__":
    main()
