"""The documentation as a program sees it: what Sphinx is taught (docs/conf.py loads it), and the snippets for tests."""
