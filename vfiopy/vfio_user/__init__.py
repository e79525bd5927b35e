"""Devices behind a socket: the second way to reach one, and to offer one (vfio-user)."""

from vfiopy.vfio_user.connect import TIMEOUT, connect
from vfiopy.vfio_user.connection import Connection
from vfiopy.vfio_user.device_io import VfioUserDeviceIo
from vfiopy.vfio_user.mapper import VfioUserMapper
from vfiopy.vfio_user.server import Server
from vfiopy.vfio_user.session import Limits

__all__ = ["TIMEOUT", "Connection", "Limits", "Server", "VfioUserDeviceIo", "VfioUserMapper", "connect"]
