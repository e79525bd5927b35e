"""tools/bench: figures with the machine that they were taken on. One module per benchmark, see registry.py."""

__all__: list[str] = []
