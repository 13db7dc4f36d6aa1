"""The ``edgelm`` command, also as ``python -m edgelm``."""

import sys


def main() -> None:
    """Run the command line. Ctrl-C ends it quietly, also while its first modules load."""
    try:
        from edgelm.cli import main as run_command
    except KeyboardInterrupt:
        sys.exit(130)
    run_command()


if __name__ == "__main__":
    main()
