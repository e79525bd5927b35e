"""Drivers worth importing, one folder or file each. They are written against vfiopy's public names alone.

Nothing is imported here, so that a script pays for the driver that it uses and for no other::

    from vfiopy.drivers import nvme
"""

__all__: list[str] = []
