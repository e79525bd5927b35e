"""Traces: what a program did with its devices, as events; written, read, and played again."""

from vfiopy.trace.event import Event
from vfiopy.trace.perfetto import Perfetto
from vfiopy.trace.places import Place, Selection
from vfiopy.trace.recorder import Recorder, Sink
from vfiopy.trace.session import tracing
from vfiopy.trace.sinks import Collect, JsonLines, Text
from vfiopy.trace.watch import UntracedWarning

__all__ = [
    "Collect",
    "Event",
    "JsonLines",
    "Perfetto",
    "Place",
    "Recorder",
    "Selection",
    "Sink",
    "Text",
    "UntracedWarning",
    "tracing",
]
