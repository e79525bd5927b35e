"""Newer suites of the system's own package mirror, read without touching the system's package configuration.

Every run of apt here has its own source list, index lists, caches and an empty package database; only the
mirror's address, the keyring and the network settings are the system's.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from .paths import LabError, cache, say

__all__ = ["Archive", "Mirror", "Package", "archives", "system_mirror", "upstream"]

ETC = Path("/etc/apt")

# Suites newer than the system, most trusted first. An alias and a name may mean the same suite, which does no
# harm; what the mirror does not know is passed over.
DEBIAN_NEWER = [["trixie", "trixie-backports"], ["stable", "stable-backports"], ["testing"], ["unstable"]]
DEBIAN_OLD = [["bookworm"], ["oldstable"], ["oldoldstable"]]
UBUNTU_NEWER = [["resolute", "resolute-updates"], ["devel"]]


@dataclasses.dataclass(frozen=True)
class Mirror:
    """Where the system's distribution comes from."""

    uris: str
    suite: str
    components: str
    signed_by: str
    """A keyring's path, or an embedded key in deb822 form; empty for the system's trusted keys."""
    trusted: str
    ubuntu: bool

    def stanza(self, suites: Iterable[str]) -> str:
        """A deb822 source stanza for ``suites`` of this mirror."""
        lines = ["Types: deb", f"URIs: {self.uris}", f"Suites: {' '.join(suites)}"]
        lines.append(f"Components: {self.components}")
        if self.signed_by:
            lines.append(f"Signed-By: {self.signed_by}")
        if self.trusted:
            lines.append(f"Trusted: {self.trusted}")
        return "\n".join(lines) + "\n"


@dataclasses.dataclass(frozen=True)
class Package:
    """One binary package of an archive."""

    name: str
    version: str
    archive: Archive


def upstream(version: str) -> tuple[int, ...]:
    """The leading numbers of a Debian version: ``1:11.1.3+ds-1`` gives (11, 1, 3)."""
    match = re.match(r"(?:\d+:)?(\d+(?:\.\d+)*)", version)
    return tuple(int(part) for part in match[1].split(".")) if match else ()


def _deb822(text: str) -> Iterable[dict[str, str]]:
    """Stanzas of a ``.sources`` file; field names in lower case, continuation lines kept as they are."""
    for block in re.split(r"\n[ \t]*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in block.splitlines():
            if line.startswith("#"):
                continue
            if line[:1] in (" ", "\t") and name:
                fields[name] += "\n" + line
            elif ":" in line:
                name, _, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = value.strip()
        if fields:
            yield fields


def _one_line(text: str) -> Iterable[dict[str, str]]:
    """Entries of a ``.list`` file, in the same form."""
    for line in text.splitlines():
        match = re.match(r"\s*(deb)\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)\s*([^#]*)", line)
        if match:
            options = dict(part.split("=", 1) for part in (match[2] or "").split() if "=" in part)
            yield {
                "types": match[1],
                "uris": match[3],
                "suites": match[4],
                "components": match[5].strip(),
                "signed-by": options.get("signed-by", ""),
                "trusted": options.get("trusted", ""),
            }


def _entries(etc: Path) -> Iterable[dict[str, str]]:
    files = [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]
    for file in files:
        if file.suffix in (".list", ".sources") and file.is_file():
            text = file.read_text(errors="replace")
            yield from _deb822(text) if file.suffix == ".sources" else _one_line(text)


def system_mirror(etc: Path = ETC, os_release: Path = Path("/etc/os-release")) -> Mirror:
    """The distribution's own source among everything in the system's apt configuration."""
    lines = os_release.read_text().splitlines()
    release = {name: value.strip("\"'") for name, _, value in (line.partition("=") for line in lines)}
    family = f"{release.get('ID', '')} {release.get('ID_LIKE', '')}"
    codename = release.get("VERSION_CODENAME", "")
    ubuntu = "ubuntu" in family
    if not ubuntu and "debian" not in family:
        raise LabError(
            f"{release.get('PRETTY_NAME', 'this system')} has no apt sources to take a kernel source from: "
            "give a ready kernel with --kernel IMAGE and install QEMU 11.0 or newer"
        )
    # A vendor may use the same suite names; the address of a mirror of the distribution ends in its name.
    home = ("/ubuntu", "/ubuntu-ports") if ubuntu else ("/debian",)
    found: list[tuple[bool, bool, Mirror]] = []
    for entry in _entries(etc):
        is_home = entry.get("uris", "").split(" ")[0].rstrip("/").endswith(home)
        names = {codename, *(("stable", "testing", "unstable", "sid") if is_home else ())} - {""}
        suites = [suite for suite in entry.get("suites", "").split() if suite in names]
        if (
            suites
            and "deb" in entry.get("types", "").split()
            and "main" in entry.get("components", "").split()
            and entry.get("enabled", "yes").lower() not in ("no", "false")
            and not entry.get("uris", "").startswith("cdrom:")
        ):
            mirror = Mirror(
                uris=entry["uris"],
                suite=suites[0],
                components="main universe" if ubuntu else "main",
                signed_by=entry.get("signed-by", ""),
                trusted=entry.get("trusted", ""),
                ubuntu=ubuntu,
            )
            found.append((not is_home, suites[0] != codename, mirror))
    if not found:
        raise LabError(f"no entry for {codename or 'this release'}, component main, in {etc}/sources.list*")
    return min(found, key=lambda item: item[:2])[2]


class Archive:
    """Some suites of the mirror, with apt state of their own below the cache."""

    def __init__(self, mirror: Mirror, suites: list[str]) -> None:
        """The last of ``suites`` is the one that packages are preferred from."""
        self.suites = suites
        self._folder = cache("apt", "_".join(suites).replace("/", "-"))
        for name in ("lists/partial", "archives/partial", "preferences"):
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        (self._folder / "status").touch()
        self._source = self._folder / "vfiopy.sources"
        self._source.write_text(mirror.stanza(suites))
        self.usable = False

    def _run(self, tool: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        options = {
            "Dir::Etc::sourcelist": str(self._source),
            "Dir::Etc::sourceparts": "/nonexistent",
            "Dir::Etc::preferences": "/nonexistent",
            "Dir::Etc::preferencesparts": str(self._folder / "preferences"),
            "Dir::State": str(self._folder),
            "Dir::State::lists": str(self._folder / "lists"),
            "Dir::State::status": str(self._folder / "status"),
            "Dir::Cache": str(self._folder),
            "Dir::Cache::archives": str(self._folder / "archives"),
            "Dir::Log": str(self._folder),
            "APT::Sandbox::User": "root",
            "APT::Default-Release": "",
            "APT::Install-Recommends": "false",
            "Acquire::Check-Valid-Until": "false",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
            "Debug::NoLocking": "true",
            "DPkg::Post-Invoke": "",
            "APT::Update::Post-Invoke": "",
            "APT::Update::Post-Invoke-Success": "",
        }
        command = [tool]
        for name, value in options.items():
            command += ["-o", f"{name}={value}"]
        environment = {**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
        return subprocess.run(
            [*command, *arguments],
            check=False,
            cwd=cwd,
            env=environment,
            text=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
        )

    def update(self) -> bool:
        """Fetch the suites' indexes; False if the mirror has no such suite or does not answer."""
        result = self._run("apt-get", "-q", "-o", "APT::Update::Error-Mode=any", "update")
        self.usable = result.returncode == 0
        return self.usable

    def find(self, pattern: str) -> list[Package]:
        """Packages whose name matches the regular expression, each with its newest version."""
        known_names = self._run("apt-cache", "pkgnames").stdout.split()
        names = [name for name in known_names if re.fullmatch(pattern, name)]
        packages: dict[str, Package] = {}
        if names:
            for line in self._run("apt-cache", "madison", *names).stdout.splitlines():
                name, version, _ = (part.strip() for part in line.split("|", 2))
                known = packages.get(name)
                if known is None or upstream(version) > upstream(known.version):
                    packages[name] = Package(name, version, self)
        return list(packages.values())

    def download(self, package: Package, folder: Path) -> Path:
        """The package's ``.deb``, in ``folder``."""
        result = self._run("apt-get", "-q", "download", f"{package.name}={package.version}", cwd=folder)
        files = sorted(folder.glob(f"{package.name}_*.deb"))
        if result.returncode or not files:
            raise LabError(f"cannot download {package.name}={package.version}:\n{result.stdout}{result.stderr}")
        return files[-1]

    def download_closure(self, package: Package) -> list[Path]:
        """The package and all it depends on, down to libc: nothing of the running system is assumed."""
        folder = self._folder / "archives"
        shutil.rmtree(folder)
        (folder / "partial").mkdir(parents=True)
        exactly = f"{package.name}={package.version}"
        # among several suites the last is meant; one alone needs no choice, and apt knows an alias by its real name
        prefer = ["-t", self.suites[-1]] if len(self.suites) > 1 else []
        result = self._run("apt-get", "-q", "-y", "--download-only", *prefer, "install", exactly)
        files = sorted(folder.glob("*.deb"))
        if result.returncode or not files:
            raise LabError(f"cannot download {exactly} and what it needs:\n{result.stdout}{result.stderr}")
        return files


@functools.cache
def archives(*, old: bool = False) -> list[Archive]:
    """The mirror's suites that are newer than the system, or (``old``) older; with their indexes fetched."""
    if shutil.which("apt-get") is None:
        raise LabError("no apt-get here: give a ready kernel with --kernel IMAGE, and install QEMU 11.0 or newer")
    mirror = system_mirror()
    if old:
        candidates = [[mirror.suite], *([] if mirror.ubuntu else DEBIAN_OLD)]
    else:
        candidates = UBUNTU_NEWER if mirror.ubuntu else DEBIAN_NEWER
    say(f"reading indexes of {mirror.uris.split()[0]} (the system's own apt configuration stays as it is)")
    found = [archive for archive in (Archive(mirror, suites) for suites in candidates) if archive.update()]
    if not found:
        raise LabError(
            f"{mirror.uris} offers none of: {', '.join(suites[-1] for suites in candidates)}. "
            "Is the network up? A ready kernel can be given with --kernel IMAGE"
        )
    return found
