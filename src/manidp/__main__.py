"""``python -m manidp`` is the ``manidp`` command."""

from manidp.cli import main

if __name__ == "__main__":
    main()
