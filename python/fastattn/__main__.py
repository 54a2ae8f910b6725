"""``python -m fastattn``: the command line."""

from fastattn.cli import main

if __name__ == "__main__":
    main()
