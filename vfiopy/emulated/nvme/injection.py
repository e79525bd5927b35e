"""What the controller is told to do wrong: rules that commands are held against."""

from __future__ import annotations

from dataclasses import dataclass, field

from vfiopy.emulated.nvme.command import Command
from vfiopy.emulated.records import Injections
from vfiopy.nvme_spec.opcodes import IoOpcode

__all__ = ["NvmeInjections", "Rule"]

_WITH_BLOCKS = (IoOpcode.READ, IoOpcode.WRITE, IoOpcode.COMPARE, IoOpcode.WRITE_ZEROES, IoOpcode.VERIFY)


@dataclass(slots=True)
class Rule:
    """Which commands something happens to, and what.

    Attributes:
        admin: True for admin commands, False for I/O commands, None for both.
        opcode: None for any.
        nsid: None for any.
        blocks: commands that touch one of these logical blocks; None for any command.
        after: let so many commands pass that it would happen to.
        count: how many commands it happens to; None for all.
        status: complete with this status, ``type << 8 | code`` (see ``vfiopy.nvme_spec.status.Code``), and do nothing.
        delay: seconds that the command takes.
        drop: do the command, and never complete it.
        hang: neither do nor complete it; Abort ends it, and so does a reset.
        fatal: report a fatal error (CSTS.CFS) and stop.
        cid: complete with this command identifier instead of the command's own.
        seen: to how many commands it has happened.
    """

    admin: bool | None = None
    opcode: int | None = None
    nsid: int | None = None
    blocks: range | None = None
    after: int = 0
    count: int | None = 1
    status: int | None = None
    delay: float | None = None
    drop: bool = False
    hang: bool = False
    fatal: bool = False
    cid: int | None = None
    seen: int = 0

    def __post_init__(self) -> None:
        if self.status is not None and not 0 < self.status < 1 << 11:
            raise ValueError(f"a status is type << 8 | code, 1 to 0x7ff, not {self.status:#x}")
        if self.cid is not None and not 0 <= self.cid < 1 << 16:
            raise ValueError(f"a command identifier has 16 bits, not {self.cid:#x}")
        if self.after < 0 or (self.count is not None and self.count < 1) or (self.delay or 0) < 0:
            raise ValueError("after and delay are not negative, and count is at least 1")
        if not (self.drop or self.hang or self.fatal) and self.status is self.delay is self.cid is None:
            raise ValueError("say what is to go wrong: status, delay, drop, hang, fatal or cid")

    def fits(self, queue: int, command: Command) -> bool:
        """Whether it is about this command of a submission queue."""
        return (
            self.admin in (None, not queue)
            and self.opcode in (None, command.opcode)
            and self.nsid in (None, command.nsid)
            and (self.blocks is None or (bool(queue) and self._touches(self.blocks, command)))
        )

    @staticmethod
    def _touches(blocks: range, command: Command) -> bool:
        first = command.cdw10 | command.cdw11 << 32
        last = first + (command.cdw12 & 0xFFFF)
        return command.opcode in _WITH_BLOCKS and first < blocks.stop and blocks.start <= last


@dataclass(slots=True)
class NvmeInjections(Injections):
    """The counters that each device has, and rules about commands.

    Attributes:
        rules: those that still hold, the first that fits decides; remove one to end it.
    """

    rules: list[Rule] = field(default_factory=list)

    def __call__(
        self,
        *,
        admin: bool | None = None,
        opcode: int | None = None,
        nsid: int | None = None,
        blocks: range | None = None,
        after: int = 0,
        count: int | None = 1,
        status: int | None = None,
        delay: float | None = None,
        drop: bool = False,
        hang: bool = False,
        fatal: bool = False,
        cid: int | None = None,
    ) -> Rule:
        """Have something go wrong: the arguments are those of :class:`Rule`, which is returned.

        Raises:
            ValueError: nothing is to go wrong, or a value is out of its range.
        """
        rule = Rule(admin, opcode, nsid, blocks, after, count, status, delay, drop, hang, fatal, cid)
        self.rules.append(rule)
        return rule

    def clear(self) -> None:
        """Forget all rules."""
        self.rules.clear()

    def find(self, queue: int, command: Command) -> Rule | None:
        """Return what happens to a command, and count it."""
        for rule in self.rules:
            if rule.fits(queue, command):
                if rule.after:
                    rule.after -= 1
                    continue
                rule.seen += 1
                if rule.count is not None:
                    rule.count -= 1
                    if not rule.count:
                        self.rules.remove(rule)
                return rule
        return None
