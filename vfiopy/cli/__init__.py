"""The command line: ``vfiopy`` and ``python -m vfiopy``."""
