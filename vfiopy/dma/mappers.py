"""The mappers of one address space, kept in step with its book as devices join and leave."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from threading import RLock
from typing import Any, Protocol, cast

from vfiopy.backend import (
    Adviser,
    BookReader,
    FileMemory,
    IovaRange,
    Mapper,
    Memory,
    MemoryKind,
    MemorySource,
    Placer,
    Prot,
)
from vfiopy.errors import MemoryKindError, NotMappedError
from vfiopy.iova import STATE_LIVE, STATE_UNKNOWN, IovaMapping, IovaSpace

__all__ = ["MapperSet", "Member"]

_EVERYTHING = frozenset(MemoryKind)


class Member(Protocol):
    """What an address space has to know of a device in it: how to make it let go."""

    def close(self) -> None:
        """Turn bus mastering off and let the device go."""


class MapperSet:
    """Which mappers there are, which devices each serves, and what all of them together can do.

    Each step of joining and leaving can be done again after it was interrupted: a KeyboardInterrupt may come anywhere.

    Mappers in Python have what the book has, in every state but reserved and unknown. One lock keeps that true: it is
    held while one of them joins or leaves, and from the first of their calls to the last of a map or unmap. While there
    is one, the book refuses to map or unmap without them.

    Attributes:
        kinds: the kinds of memory that every mapper takes.
        in_python: the mappers that native code cannot call by itself.
        by_address: the mappers that need device memory to be mapped in this process: type1, devices that are software.
    """

    def __init__(self, book: IovaSpace, label: str) -> None:
        self._book = book
        self._label = label
        self._tokens: dict[Mapper, int | None] = {}
        self._members: dict[Mapper, list[Member]] = {}
        self.in_python: list[Mapper] = []
        self.by_address: list[Mapper] = []
        self._lock = RLock()
        self.kinds = _EVERYTHING

    def __iter__(self) -> Any:
        return iter(tuple(self._tokens))

    def __contains__(self, mapper: Mapper) -> bool:
        return mapper in self._tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def members(self) -> list[Member]:
        """Return all devices."""
        return [member for members in self._members.values() for member in members]

    # --- devices come and go -------------------------------------------------------------------------------------

    def join(self, mapper: Mapper, member: Member) -> None:
        """Take a device in; replay what is mapped into a mapper that is new. On failure all is as before."""
        with self._lock:
            if mapper in self._tokens:
                self.refresh()
                self._members[mapper].append(member)
            else:
                self.add(mapper, member)

    def add(self, mapper: Mapper, *members: Member) -> None:
        """Take in a mapper whose devices are to come."""
        with self._lock:
            self._tokens[mapper] = None
            try:
                self.refresh()
                self._connect(mapper)
                self._members[mapper] = list(members)
            except BaseException:
                self._forget(mapper)
                self.refresh()
                raise

    def _connect(self, mapper: Mapper) -> None:
        target = mapper.kernel_target
        if target is not None:
            token = self._tokens[mapper] = self._book.add_kernel_mapper(target.kind, target.fd, target.object_id)
            self._book.replay(token)
        elif isinstance(mapper, BookReader):
            mapper.attach_book(self._book)
        else:
            self._replay(mapper)

    def _replay(self, mapper: Mapper) -> None:
        # What native code is at is over after this, and what Python is at waits for the lock.
        self._book.set_stepwise(True)
        done = _Calls()
        try:
            for found in self._book.mappings():
                if found.state != STATE_UNKNOWN:
                    done.map(mapper, found.iova, cast("Memory", found.memory), Prot(found.prot))
            self.in_python.append(mapper)
        except BaseException as error:
            done.undo(error)
            raise

    def leave(self, mapper: Mapper, member: Member) -> None:
        """Let a device go; the last one takes its mapper along.

        A VFIO container forgets its mappings with its last group, and an IOAS without devices serves nobody. A device
        that joins later gets a new mapper and a replay.
        """
        with self._lock:
            members = self._members.get(mapper)
            if members is None or member not in members:
                return
            if members == [member]:
                self._close(mapper)
            members.remove(member)
            self.refresh()

    def close(self) -> None:
        """Close mappers whose devices never came."""
        with self._lock:
            for mapper, members in list(self._members.items()):
                if not members:
                    self._close(mapper)

    def _close(self, mapper: Mapper) -> None:
        token = self._tokens.get(mapper)
        if token is not None and mapper.adopted:
            # Somebody else keeps the container or IOAS open: what we mapped would stay within devices' reach.
            self._book.drop(token)
        mapper.close()
        self._forget(mapper)

    def _forget(self, mapper: Mapper) -> None:
        token = self._tokens.get(mapper)
        if token is not None:
            self._book.remove_kernel_mapper(token)
        self._tokens.pop(mapper, None)
        self._members.pop(mapper, None)
        if mapper in self.in_python:
            self.in_python.remove(mapper)
        self._book.set_stepwise(bool(self.in_python))

    def refresh(self) -> None:
        """Tell the book what all mappers together can do; without one the last geometry stays, and maps are kept."""
        self._book.set_stepwise(bool(self.in_python))
        traits = [mapper.traits() for mapper in self._tokens]
        self.by_address = [mapper for mapper, its in zip(self._tokens, traits, strict=True) if not its.dmabufs]
        if not traits:
            self.kinds = _EVERYTHING
            return
        self.kinds = _EVERYTHING.intersection(*(trait.memory for trait in traits))
        limits = [trait.max_mappings for trait in traits if trait.max_mappings]
        usable: list[IovaRange] = reduce(_intersect, [mapper.ranges() for mapper in self._tokens])
        page_sizes = reduce(lambda a, b: a & b, (trait.page_sizes for trait in traits))
        self._book.set_usable(usable, page_sizes, min(limits, default=0))

    # --- mapping through mappers that are Python -----------------------------------------------------------------

    def check_kind(self, kind: MemoryKind) -> None:
        """Raise MemoryKindError, naming who, unless every mapper takes this kind of memory."""
        if kind in self.kinds:
            return
        names = [mapper.name for mapper in self._tokens if kind not in mapper.traits().memory]
        raise MemoryKindError(
            f"{', '.join(names)} cannot map memory of kind {kind.name}",
            object=self._label,
            hint="host memory works everywhere; a BAR needs iommufd and a dma-buf",
        )

    def allocate(self, size: int) -> FileMemory | None:
        """Return memory of a mapper that wants it of its own making, or None where nobody cares."""
        if MemoryKind.FILE in self.kinds:
            for mapper in self.in_python:
                if isinstance(mapper, MemorySource):
                    return mapper.allocate(size)
        return None

    def place(self, memory: Memory) -> int:
        """Return the IOVA that a mapper insists on, or -1 for the book's choice."""
        for mapper in self.in_python:
            if isinstance(mapper, Placer):
                return mapper.place(memory)
        return -1

    def advise(self, memory: Memory, limit: int) -> int | None:
        """Return the IOVA that a mapper would like best, if any; others may be against it."""
        for mapper in self.in_python:
            if isinstance(mapper, Adviser) and (iova := mapper.advise(memory, limit)) is not None:
                return iova
        return None

    def map(self, memory: Memory, prot: Prot, arguments: tuple[Any, ...]) -> tuple[int, int]:
        """Map everywhere or nowhere; return the IOVA and the mapping's serial number."""
        done = _Calls()
        with self._lock, self._book.begin_map(*arguments) as reserved:
            try:
                for mapper in self.in_python:
                    done.map(mapper, reserved.iova, memory, prot)
                return reserved.iova, reserved.commit()
            except BaseException as error:
                if reserved.serial is None:  # else it came about before it was interrupted, as without Python mappers
                    done.undo(error)
                raise

    def unmap(self, iova: int, size: int | None, timeout: float) -> int:
        """Unmap everywhere or nowhere; return the number of bytes."""
        if size is None:
            found = self._book.find(iova)
            if found is None or found[0] != iova:
                raise NotMappedError(
                    f"no mapping begins at IOVA {iova:#x}",
                    object=self._label,
                    hint="unmap whole mappings, by their first IOVA",
                )
            size = found[1]
        done = _Calls()
        # Not under the lock: this may wait for pins, and who has them may have to map or unmap something first.
        with self._book.begin_unmap(iova, iova + size - 1, timeout) as marked, self._lock:
            try:
                for one in marked.mappings:
                    for mapper in self.in_python:
                        done.unmap(mapper, one)
                unmapped = marked.finish()
            except BaseException as error:
                # What the book still has must be there for the mappers in Python too.
                done.undo(error, None if marked else self._is_live)
                raise
            return unmapped

    def _is_live(self, mapping: IovaMapping) -> bool:
        now = self._book.find(mapping.iova)
        return now is not None and now.serial == mapping.serial and now.state == STATE_LIVE


class _Calls:
    """Calls of mappers in Python, to be undone. Each is noted before it is made, so that none goes unnoticed."""

    def __init__(self) -> None:
        self._begun: list[tuple[Mapper, IovaMapping | tuple[int, int]]] = []
        self._done = 0

    def map(self, mapper: Mapper, iova: int, memory: Memory, prot: Prot) -> None:
        self._begun.append((mapper, (iova, memory.size)))
        mapper.map(iova, memory, prot)
        self._done += 1

    def unmap(self, mapper: Mapper, mapping: IovaMapping) -> None:
        self._begun.append((mapper, mapping))
        mapper.unmap(mapping.iova, mapping.size)
        self._done += 1

    def undo(self, error: BaseException, wanted: Callable[[IovaMapping], bool] | None = None) -> None:
        """Undo the calls, last first, but unmaps only where ``wanted``; what goes wrong is noted on ``error``.

        A call that raised has done nothing, except where it was interrupted: nobody knows, so undoing it may fail.
        """
        for index, (mapper, what) in reversed(list(enumerate(self._begun))):
            sure = index < self._done
            if not sure and isinstance(error, Exception):
                continue
            try:
                if not isinstance(what, IovaMapping):
                    mapper.unmap(*what)
                elif wanted is None or wanted(what):
                    mapper.map(what.iova, cast("Memory", what.memory), Prot(what.prot))
            except Exception as trouble:
                if sure:
                    error.add_note(f"while putting things back: {trouble}")


def _intersect(left: list[IovaRange], right: list[IovaRange]) -> list[IovaRange]:
    """Intersect two sorted lists of disjoint ranges."""
    result = []
    i = j = 0
    while i < len(left) and j < len(right):
        first = max(left[i].first, right[j].first)
        last = min(left[i].last, right[j].last)
        if first <= last:
            result.append(IovaRange(first, last))
        if left[i].last < right[j].last:
            i += 1
        else:
            j += 1
    return result
