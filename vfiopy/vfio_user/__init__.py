"""Devices behind a socket: the second way to reach one, and to offer one (vfio-user)."""
