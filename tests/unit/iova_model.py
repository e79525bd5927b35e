"""The IOVA space once more, in plain Python: lists, dicts, and no thought of speed. The judge of the native one."""

from __future__ import annotations

import contextlib
import errno
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from iova_geometry_model import (
    CLOSING,
    LIVE,
    MMIO,
    REMOTE,
    RESERVED,
    TOP,
    UNIT,
    UNKNOWN,
    UNMAPPING,
    Geometry,
    Mapped,
    Refused,
)
from iova_kernel import FakeKernel

from vfiopy import errors

__all__ = ["CLOSING", "RESERVED", "TOP", "UNKNOWN", "UNMAPPING", "Model", "Refused"]


@dataclass
class Mapper:
    slot: int
    fd: int
    ioas: bool
    active: bool = True


class Model(Geometry):
    """One method for each of the native ones; raises :class:`Refused` where that must raise."""

    def __init__(self, kernel: FakeKernel) -> None:
        super().__init__()
        self.kernel = kernel
        self.mappers: dict[int, Mapper] = {}
        self.owners: dict[int, Callable[[int, int], None] | None] = {0: None}
        self.begun: list[list[Mapped]] = []

    # --- mapping -------------------------------------------------------------------------------------------------

    def reserve(
        self, memory: object, address: int, size: int, prot: int, iova: int, limit: int, align: int, kind: int,
        fd: int, fd_offset: int, transient: bool,
    ) -> Mapped:  # fmt: skip
        needed = max(align, self.page)
        if size == 0 or (iova >= 0 and iova + size - 1 > TOP):
            raise Refused(errors.IovaRangeError)
        if align & (align - 1) or (iova >= 0 and iova % needed):
            raise Refused(errors.AlignmentError)
        if size % self.page or address % self.page or fd_offset % self.page:
            raise Refused(errors.AlignmentError)
        if max(iova, 0) + size - 1 > limit:
            raise Refused(errors.IovaRangeError)
        if self.max_mappings and len(self.mapped) >= self.max_mappings:
            raise Refused(errors.NoSpaceError)
        if iova < 0:
            iova = self._choose(size, address or fd_offset, needed, limit, transient)
        else:
            self._check_fixed(iova, iova + size - 1)
        it = Mapped(iova, size, prot, address, kind, fd, fd_offset, memory)
        self.mapped = sorted([*self.mapped, it], key=lambda each: each.iova)
        return it

    def map(self, *arguments: object) -> int:
        it = self.reserve(*arguments)  # type: ignore[arg-type]
        self._commit(it)
        return it.iova

    def begin_map(self, *arguments: object) -> int:
        it = self.reserve(*arguments)  # type: ignore[arg-type]
        it.handed_out = True
        return it.iova

    def _handed_out(self, iova: int) -> Mapped:
        it = next(it for it in self.mapped if it.iova == iova)
        assert it.state == RESERVED
        assert it.handed_out
        it.handed_out = False
        return it

    def commit_map(self, iova: int) -> None:
        self._commit(self._handed_out(iova))

    def abort_map(self, iova: int) -> None:
        self.mapped.remove(self._handed_out(iova))

    def _commit(self, it: Mapped) -> None:
        missing = [each for each in self._in_order() if each.active and each.slot not in it.slots]
        for mapper in missing:
            kind = self._map_in(mapper, it)
            if kind is None:
                continue
            for other in self._in_order():
                if other.slot in it.slots and not self._unmap_in(other, it):
                    it.slots.discard(other.slot)
            if it.slots:
                it.state = UNKNOWN
            else:
                self.mapped.remove(it)
            raise Refused(kind)
        it.state = LIVE

    # --- mappers -------------------------------------------------------------------------------------------------

    def _in_order(self) -> list[Mapper]:
        return sorted(self.mappers.values(), key=lambda each: each.slot)

    def _map_in(self, mapper: Mapper, it: Mapped) -> type[Exception] | None:
        if it.kind == REMOTE or not (it.address or mapper.ioas):
            return errors.MemoryKindError
        call = "IOMMU_IOAS_MAP_FILE" if it.fd >= 0 else "IOMMU_IOAS_MAP"
        number = self.kernel.map(mapper.fd, it.iova, it.entry(ioas=mapper.ioas))
        if number == errno.EFAULT and mapper.ioas:  # the answer may have been lost, after the mapping was made
            self.kernel.unmap(mapper.fd, it.iova, it.size, ioas=True)
        if number:
            return type(errors.from_errno(number, call=call if mapper.ioas else "VFIO_IOMMU_MAP_DMA", object=""))
        it.slots.add(mapper.slot)
        return None

    def _unmap_in(self, mapper: Mapper, it: Mapped) -> tuple[type[Exception], bool] | None:
        """The class, and whether the mapper says that it does not have the mapping; None: done."""
        number, done = self.kernel.unmap(mapper.fd, it.iova, it.size, ioas=mapper.ioas)
        if number:
            call = "IOMMU_IOAS_UNMAP" if mapper.ioas else "VFIO_IOMMU_UNMAP_DMA"
            return type(errors.from_errno(number, call=call, object="")), number == 2
        return None if done == it.size else (errors.NotMappedError, True)

    def add_mapper(self, token: int, fd: int, *, ioas: bool) -> None:
        taken = {each.slot for each in self.mappers.values()}
        self.mappers[token] = Mapper(min(set(range(33)) - taken), fd, ioas)

    def remove_mapper(self, token: int) -> None:
        slot = self.mappers.pop(token).slot
        for it in self.mapped:
            it.slots.discard(slot)

    def drop(self, token: int) -> None:
        mapper = self.mappers[token]
        mapper.active = False
        failure = None
        for it in self.mapped:
            if mapper.slot in it.slots:
                wrong = self._unmap_in(mapper, it)
                if wrong is None or wrong[1]:
                    it.slots.discard(mapper.slot)
                else:
                    failure = failure or wrong[0]
        if failure:
            raise Refused(failure)

    def replay(self, token: int) -> None:
        mapper = self.mappers[token]
        mapper.active = True
        for it in self.mapped:
            if it.state in {RESERVED, UNKNOWN} or mapper.slot in it.slots:
                continue
            kind = self._map_in(mapper, it)
            if kind is not None:
                with contextlib.suppress(Refused):
                    self.drop(token)
                raise Refused(kind)

    # --- looking -------------------------------------------------------------------------------------------------

    def at(self, iova: int) -> Mapped | None:
        return next((it for it in self.mapped if it.iova <= iova <= it.last), None)

    def rows(self, first: int = 0, last: int = TOP) -> list[tuple[object, ...]]:
        return [it.row() for it in self.mapped if it.iova <= last and first <= it.last and it.state != RESERVED]

    def by_address(self, address: int, size: int) -> list[tuple[object, ...]]:
        return [
            it.row()
            for it in self.mapped
            if it.address and it.address < address + size and address < it.address + it.size
            and it.state != RESERVED
        ]  # fmt: skip

    def check(self, iova: int, size: int, prot: int) -> list[tuple[int, int, object]]:
        segments = []
        at, end = iova, iova + size
        while at < end:
            it = self.at(at)
            if it is None or it.state not in {LIVE, CLOSING}:
                raise Refused(errors.NotMappedError)
            if it.prot & prot != prot:
                raise Refused(errors.PermissionDeniedError)
            stop = min(end, it.last + 1)
            segments.append((it.address + at - it.iova, stop - at, it.memory))
            at = stop
        return segments

    # --- unmapping -----------------------------------------------------------------------------------------------

    def _claim(self, first: int, last: int) -> list[Mapped]:
        for end in (first, last):
            it = self.at(end)
            if it is not None and (it.iova < first or it.last > last):
                raise Refused(errors.NotMappedError)
        touched = [it for it in self.mapped if it.iova <= last and first <= it.last]
        for it in touched:
            if it.state in {RESERVED, UNKNOWN}:
                raise Refused(errors.BusyError)
            if it.state in {CLOSING, UNMAPPING}:
                raise Refused(errors.UnmappingError)
        return touched

    def _mark(self, first: int, last: int) -> list[Mapped]:
        touched = self._claim(first, last)
        if any(it.held for it in touched):
            for it in touched:
                it.state = CLOSING
            for it in touched:
                for owner in list(it.held):
                    callback = self.owners[owner]
                    if callback is not None:
                        callback(it.iova, it.size)
            for it in touched:
                it.state = LIVE
            if any(it.held for it in touched):
                raise Refused(errors.PinnedError)
        for it in touched:
            it.state = UNMAPPING
        return touched

    def _finish(self, touched: list[Mapped]) -> int:
        done = 0
        for index, it in enumerate(touched):
            failure = self._unmap_everywhere(it)
            if failure:
                for other in touched[index + 1 :]:
                    other.state = LIVE
                raise Refused(failure)
            self.mapped.remove(it)
            done += it.size
        return done

    def _unmap_everywhere(self, it: Mapped) -> type[Exception] | None:
        gone: list[Mapper] = []
        for mapper in self._in_order():
            if mapper.slot not in it.slots:
                continue
            wrong = self._unmap_in(mapper, it)
            if wrong is None:
                gone.append(mapper)
                continue
            kind, not_there = wrong
            lost = [each for each in gone if self._map_in(each, it) is not None]
            it.slots -= {each.slot for each in lost}
            it.state = UNKNOWN if lost or not_there else LIVE
            return kind
        it.slots.clear()
        return None

    def unmap(self, iova: int) -> int:
        it = self.at(iova)
        if it is None or it.iova != iova:
            raise Refused(errors.NotMappedError)
        return self._finish(self._mark(iova, it.last))

    def unmap_range(self, first: int, last: int) -> int:
        return self._finish(self._mark(first, last))

    def begin_unmap(self, first: int, last: int) -> list[tuple[object, ...]]:
        touched = self._mark(first, last)
        self.begun.append(touched)
        for it in touched:
            it.handed_out = True
        return [it.row() for it in touched]

    def _adopt(self, number: int) -> list[Mapped]:
        adopted = self.begun.pop(number)
        for it in adopted:
            it.handed_out = False
        return adopted

    def finish_unmap(self, number: int) -> int:
        return self._finish(self._adopt(number))

    def abort_unmap(self, number: int) -> None:
        for it in self._adopt(number):
            it.state = LIVE

    def resync(self) -> int:
        done, failure = 0, None
        for it in [each for each in self.mapped if each.state == UNKNOWN]:
            for mapper in self._in_order():
                if mapper.slot in it.slots:
                    wrong = self._unmap_in(mapper, it)
                    if wrong is None or wrong[1]:
                        it.slots.discard(mapper.slot)
                    else:
                        failure = failure or wrong[0]
            if not it.slots:
                self.mapped.remove(it)
                done += it.size
        if failure:
            raise Refused(failure)
        return done

    # --- pins ----------------------------------------------------------------------------------------------------

    def _parts(self, first: int, last: int) -> Iterator[tuple[Mapped, range]]:
        at = first
        while True:
            it = self.at(at)
            if it is None:
                raise Refused(errors.NotMappedError)
            stop = min(last, it.last)
            yield it, range(at // UNIT, stop // UNIT + 1)
            if stop == last:
                return
            at = stop + 1

    def pin(self, iova: int, size: int, prot: int, owner: int, peer: bool) -> None:
        if owner not in self.owners:
            raise Refused(errors.StateError)
        parts = []
        for it, pages in self._parts(iova, iova + size - 1):
            if it.state in {CLOSING, UNMAPPING}:
                raise Refused(errors.UnmappingError)
            if it.state != LIVE:
                raise Refused(errors.BusyError)
            if it.prot & prot != prot:
                raise Refused(errors.PermissionDeniedError)
            if it.kind == MMIO and not peer:
                raise Refused(errors.MemoryKindError)
            parts.append((it, pages))
        for it, pages in parts:
            it.pins.update(pages)
            it.held[owner] += len(pages)

    def unpin(self, iova: int, size: int, owner: int) -> None:
        parts = []
        for it, pages in self._parts(iova, iova + size - 1):
            if it.held[owner] < len(pages) or not all(it.pins[page] for page in pages):
                it.held += Counter()  # looking made an entry
                it.pins += Counter()
                raise Refused(errors.UnpinError)
            parts.append((it, pages))
        for it, pages in parts:
            it.pins.subtract(pages)
            it.pins += Counter()
            it.held[owner] -= len(pages)
            it.held += Counter()
