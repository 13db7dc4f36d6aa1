"""``python -m edgelm`` is the ``edgelm`` command."""

from edgelm.cli import main

if __name__ == "__main__":
    main()
