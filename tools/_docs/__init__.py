"""What Sphinx is taught for docs/: references, reference pages made from the code, pictures. docs/conf.py loads it."""
