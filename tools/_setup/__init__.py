"""What tools/test and tools/demo share: system packages, the virtual environment, the native build.

Standard library only: it runs before any virtual environment exists.
"""

__all__: list[str] = []
