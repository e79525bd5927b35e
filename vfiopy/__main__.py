"""``python -m vfiopy``."""

from vfiopy.cli.main import main

if __name__ == "__main__":
    main()
