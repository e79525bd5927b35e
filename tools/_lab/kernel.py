"""The guest's kernel: built once per machine from the distribution's kernel source, then cached."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from .apt import Package, archives, upstream
from .needs import KERNEL, missing
from .paths import LabError, cache, finished_folder, is_finished, locked, say, scratch
from .process import dies_with_us

__all__ = ["FLAVOURS", "Kernel", "cached_kernel", "ensure_kernel"]

HERE = Path(__file__).resolve().parent
MINIMUM = (6, 19)  # dma-buf export and import
ESSENTIAL = ("CONFIG_VFIO", "CONFIG_VFIO_PCI", "CONFIG_9P_FS", "CONFIG_VIRTIO_CONSOLE", "CONFIG_INTEL_IOMMU")
ESSENTIAL_NEW = (*ESSENTIAL, "CONFIG_IOMMUFD", "CONFIG_VFIO_DEVICE_CDEV", "CONFIG_VFIO_PCI_DMABUF")
PROGRESS_SECONDS = 20.0


@dataclasses.dataclass(frozen=True)
class Flavour:
    """A way to configure the kernel."""

    fragments: tuple[str, ...]
    series: str = ""
    """Build this series (``6.1``) instead of the newest."""


FLAVOURS = {
    "lab": Flavour(("kernel.config",)),
    "compat": Flavour(("kernel.config", "kernel-compat.config")),
    "debug": Flavour(("kernel.config", "kernel-debug.config")),
    "old": Flavour(("kernel.config", "kernel-old.config"), series="6.1"),
}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel that can be booted."""

    image: Path
    headers: Path | None
    """Its exported headers (the folder that holds ``linux/vfio.h``)."""
    name: str


def _fragment(flavour: Flavour) -> str:
    return "\n".join((HERE / name).read_text() for name in flavour.fragments)


def _digest(flavour: Flavour) -> str:
    return hashlib.sha256(_fragment(flavour).encode()).hexdigest()[:12]


def cached_kernel(name: str, series: str = "") -> Kernel | None:
    """The newest finished build of flavour ``name`` (and series) with today's configuration, if any."""
    series = series or FLAVOURS[name].series
    ending = f"-{name}-{_digest(FLAVOURS[name])}"
    found = []
    for folder in cache("kernels").glob(f"*{ending}"):
        version = upstream(folder.name)
        if is_finished(folder) and (not series or folder.name.startswith(f"{series}.")):
            found.append((version, folder))
    if not found:
        return None
    folder = max(found)[1]
    return Kernel(folder / "bzImage", folder / "include", folder.name)


def _source(series: str) -> Package:
    """The package with the newest kernel source, or with that of ``series``."""
    candidates: list[Package] = []
    for archive in archives(old=bool(series)):
        for package in archive.find(r"linux-source-\d+\.\d+(\.0)?"):
            number = upstream(package.name.rpartition("-")[2])[:2]
            if (number == upstream(series)[:2]) if series else (number >= MINIMUM):
                candidates.append(package)
    if not candidates:
        wanted = f"linux-source-{series}" if series else "linux-source-X.Y of 6.19 or later"
        raise LabError(f"no suite of the mirror has {wanted}; a ready kernel can be given: --kernel IMAGE")
    return max(candidates, key=lambda package: upstream(package.version))


def _extract(package: Package, folder: Path) -> Path:
    """Fetch and unpack the source; returns its top folder."""
    say(f"downloading {package.name} {package.version} from {package.archive.suites[-1]} (about 150 MB)")
    deb = package.archive.download(package, folder)
    say("unpacking the kernel source")
    subprocess.run(["dpkg-deb", "-x", str(deb), str(folder / "deb")], check=True)
    deb.unlink()
    tarball = next((folder / "deb" / "usr" / "src").rglob("linux-source-*.tar.*"))
    subprocess.run(["tar", "-xf", str(tarball), "-C", str(folder)], check=True)
    shutil.rmtree(folder / "deb")
    return next(path.parent for path in folder.glob("*/Kconfig"))


class _Progress:
    """Counts what make says it did."""

    def __init__(self) -> None:
        self._started = self._said = time.monotonic()
        self._objects = 0
        self._live = sys.stderr.isatty()

    def line(self, text: str) -> None:
        """Take in one line of make's output."""
        self._objects += text.startswith(("  CC ", "  AS "))
        now = time.monotonic()
        if now - self._said >= (1.0 if self._live else PROGRESS_SECONDS):
            self._said = now
            minutes, seconds = divmod(int(now - self._started), 60)
            message = f"lab: building the kernel: {self._objects} objects, {minutes}:{seconds:02d}"
            before, after = ("\r", "") if self._live else ("", "\n")
            print(before + message, end=after, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Close the line that was rewritten in place."""
        if self._live:
            print(file=sys.stderr)


def _make(source: Path, build: Path, log: Path, *arguments: str) -> None:
    """Run make, count objects; on failure raise with the log's last lines."""
    tail: collections.deque[str] = collections.deque(maxlen=25)
    command = ["make", "-C", str(source), f"O={build}", f"-j{os.cpu_count() or 1}", *arguments]
    # a user's MAKEFLAGS or compiler variables must not change the lab's kernel
    keep = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH") if name in os.environ}
    progress = _Progress()
    with log.open("a") as record:
        process = subprocess.Popen(
            dies_with_us(command),
            env={**keep, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                record.write(line)
                tail.append(line)
                progress.line(line)
            process.wait()
        finally:
            if process.poll() is None:  # interrupted: make and all its compilers
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
            progress.end()
    if process.returncode:
        raise LabError(f"make {' '.join(arguments)} failed; the log is {log}, its end:\n{''.join(tail)}")


def _check_config(build: Path, fragment: str, essential: tuple[str, ...]) -> None:
    """Name the options that did not take effect; stop if the lab cannot do without one."""
    config = set((build / ".config").read_text().splitlines())
    wanted = dict(re.findall(r"^(CONFIG_\w+)=(\S+)", fragment, re.M))  # a later fragment overrides an earlier one
    present = {line.partition("=")[0] for line in config}
    lost = [name for name, value in wanted.items() if value != "n" and name not in present]
    if lost:
        say(f"this kernel does not have {len(lost)} of {len(wanted)} wanted options: {' '.join(lost)}")
    broken = [name for name in essential if f"{name}=y" not in config]
    if broken:
        raise LabError(f"the kernel's configuration lost {', '.join(broken)}: see {HERE.name}/*.config")


def _build(package: Package, name: str, target: Path) -> None:
    """Build the kernel and its headers into ``target``; all else is removed again."""
    flavour = FLAVOURS[name]
    log = cache("logs", f"kernel-{target.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    started = time.monotonic()
    with scratch("kernel") as work:
        source = _extract(package, work)
        build = work / "build"
        build.mkdir()
        fragment = build / "lab.fragment"
        fragment.write_text(_fragment(flavour))
        _make(source, build, log, f"KCONFIG_ALLCONFIG={fragment}", "allnoconfig")
        _check_config(build, fragment.read_text(), ESSENTIAL if flavour.series else ESSENTIAL_NEW)
        say(f"building {package.name} {package.version}, flavour {name}; log: {log}")
        _make(source, build, log, "bzImage")
        _make(source, build, log, "headers")
        with finished_folder(target) as result:
            shutil.copy(build / "arch/x86/boot/bzImage", result)
            shutil.copy(build / ".config", result / "config")
            shutil.copy(build / "System.map", result)
            shutil.copytree(build / "usr/include", result / "include", ignore=shutil.ignore_patterns(".*", "Makefile"))
    say(f"kernel {target.name} built in {time.monotonic() - started:.0f} s")


def ensure_kernel(name: str = "lab", *, series: str = "", image: Path | None = None, update: bool = False) -> Kernel:
    """A kernel of flavour ``name``: ``image`` if given, else the cached one, else a fresh build.

    ``update`` asks the mirror for a newer source even if a kernel is cached.
    """
    series = series or FLAVOURS[name].series
    if image is not None:
        if not image.is_file():
            raise LabError(f"no kernel image at {image}")
        known = cached_kernel(name, series)
        return Kernel(image.resolve(), known.headers if known else None, image.name)
    known = cached_kernel(name, series)
    if known and not update:
        return known
    with locked("kernel"):
        known = cached_kernel(name, series)
        if known and not update:
            return known
        if lacking := missing(KERNEL):
            raise LabError(f"building the kernel needs packages: apt-get install {' '.join(lacking)}")
        package = _source(series)
        target = cache("kernels", f"{package.version.split(':')[-1]}-{name}-{_digest(FLAVOURS[name])}")
        if not is_finished(target):
            _build(package, name, target)
    kernel = cached_kernel(name, series)
    if kernel is None:
        raise LabError(f"{target} disappeared after the build")
    return kernel
