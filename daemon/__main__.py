"""`python -m daemon`, and the command `daemon`."""

from daemon.cli.root import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
