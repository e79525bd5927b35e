"""The mappers of one address space, kept in step with its book as devices join and leave."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, Protocol

from vfiopy.backend import BookReader, FileMemory, IovaRange, Mapper, Memory, MemoryKind, MemorySource, Placer, Prot
from vfiopy.errors import MemoryKindError, NotMappedError
from vfiopy.iova import IovaSpace

__all__ = ["MapperSet", "Member"]

_EVERYTHING = frozenset(MemoryKind)


class Member(Protocol):
    """What an address space has to know of a device in it: how to make it let go."""

    def close(self) -> None:
        """Turn bus mastering off and let the device go."""


class MapperSet:
    """Which mappers there are, which devices each serves, and what all of them together can do.

    Each step of joining and leaving can be done again after it was interrupted: a KeyboardInterrupt may come anywhere.

    Attributes:
        kinds: the kinds of memory that every mapper takes.
        in_python: the mappers that native code cannot call by itself.
    """

    def __init__(self, book: IovaSpace, label: str) -> None:
        self._book = book
        self._label = label
        self._tokens: dict[Mapper, int | None] = {}
        self._members: dict[Mapper, list[Member]] = {}
        self.in_python: list[Mapper] = []
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
        if mapper in self._tokens:
            self.refresh()
            self._members[mapper].append(member)
        else:
            self.add(mapper, member)

    def add(self, mapper: Mapper, *members: Member) -> None:
        """Take in a mapper whose devices are to come."""
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
            # First it takes part in new maps, then it is told of the old ones: none is missed in between.
            self._replay(mapper)

    def _replay(self, mapper: Mapper) -> None:
        done: list[tuple[int, int]] = []
        self.in_python.append(mapper)
        try:
            for iova, size, prot, _address, _kind, _state, memory in self._book.mappings():
                mapper.map(iova, memory, Prot(prot))
                done.append((iova, size))
        except BaseException as error:
            _roll_back(error, [partial(mapper.unmap, *one) for one in reversed(done)])
            raise

    def leave(self, mapper: Mapper, member: Member) -> None:
        """Let a device go; the last one takes its mapper along.

        A VFIO container forgets its mappings with its last group, and an IOAS without devices serves nobody. A device
        that joins later gets a new mapper and a replay.
        """
        members = self._members.get(mapper)
        if members is None or member not in members:
            return
        if members == [member]:
            self._close(mapper)
        members.remove(member)
        self.refresh()

    def close(self) -> None:
        """Close mappers whose devices never came."""
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

    def refresh(self) -> None:
        """Tell the book what all mappers together can do; without one the last geometry stays, and maps are kept."""
        if not self._tokens:
            self.kinds = _EVERYTHING
            return
        traits = [mapper.traits() for mapper in self._tokens]
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

    def map(self, memory: Memory, prot: Prot, arguments: tuple[Any, ...]) -> tuple[int, int]:
        """Map everywhere or nowhere; return the IOVA and the mapping's serial number."""
        at = self._book.begin_map(*arguments)
        done: list[Mapper] = []
        try:
            for mapper in self.in_python:
                mapper.map(at, memory, prot)
                done.append(mapper)
            serial = self._book.commit_map(at)  # the kernel's mappers; on failure the book has given the range back
        except BaseException as error:
            undo: list[Callable[[], object]] = [partial(one.unmap, at, memory.size) for one in reversed(done)]
            if len(done) < len(self.in_python):
                undo.append(partial(self._book.abort_map, at))
            _roll_back(error, undo)
            raise
        return at, serial

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
        last = iova + size - 1
        marked = self._book.begin_unmap(iova, last, timeout)
        undo: list[tuple[int, Callable[[], object]]] = []
        finishing = False
        try:
            for first, length, prot, _address, _kind, _state, memory in marked:
                for mapper in self.in_python:
                    mapper.unmap(first, length)
                    undo.append((first, partial(mapper.map, first, memory, Prot(prot))))
            finishing = True
            return self._book.finish_unmap(iova, last)
        except BaseException as error:
            if not finishing:
                _roll_back(error, [*(step for _, step in reversed(undo)), partial(self._book.abort_unmap, iova, last)])
            else:
                # The kernel refused: what the book still has must be there for the mappers in Python too.
                _roll_back(error, [step for first, step in reversed(undo) if self._book.find(first) is not None])
            raise


def _roll_back(error: BaseException, steps: list[Callable[[], object]]) -> None:
    """Take every step, whatever the others raise; what goes wrong is noted on the error that is under way."""
    for step in steps:
        try:
            step()
        except Exception as trouble:
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
