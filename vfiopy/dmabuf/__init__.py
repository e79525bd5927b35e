"""dma-bufs: memory shared by file descriptor, with its fences and its exporter. Importing one is vfiopy.dma's."""

from vfiopy.dmabuf.buffer import DmaBuf
from vfiopy.dmabuf.fence import Fence
from vfiopy.dmabuf.info import DmaBufInfo
from vfiopy.dmabuf.life import ExporterLife
from vfiopy.kernel.ioctl import MemfdPart

__all__ = ["DmaBuf", "DmaBufInfo", "ExporterLife", "Fence", "MemfdPart"]
