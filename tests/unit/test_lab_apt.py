"""Which mirror the lab reads, from the forms of apt sources that exist."""

from __future__ import annotations

from pathlib import Path

import lab_import  # noqa: F401
import pytest

from tools._lab.apt import system_mirror, upstream
from tools._lab.paths import LabError

DEBIAN = 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nID=debian\nVERSION_CODENAME=bookworm\n'
UBUNTU = 'ID=ubuntu\nID_LIKE=debian\nVERSION_CODENAME="noble"\n'

THIRD_PARTY = "deb [arch=amd64] https://packages.example.com/apt stable main\n"


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d" / "a-vendor.list").write_text(THIRD_PARTY)
    return tmp_path


def os_release(folder: Path, text: str) -> Path:
    path = folder / "os-release"
    path.write_text(text)
    return path


def test_deb822_source_with_a_keyring(etc: Path) -> None:
    (etc / "sources.list.d" / "debian.sources").write_text(
        "# a comment\nTypes: deb deb-src\nURIs: http://mirror.example.org/debian\nSuites: bookworm bookworm-updates\n"
        "Components: main contrib\nSigned-By: /usr/share/keyrings/some.gpg\n\n"
        "Types: deb\nURIs: http://mirror.example.org/debian-security\nSuites: bookworm-security\nComponents: main\n"
    )
    mirror = system_mirror(etc, os_release(etc, DEBIAN))
    assert (mirror.uris, mirror.suite) == ("http://mirror.example.org/debian", "bookworm")
    assert mirror.stanza(["testing"]) == (
        "Types: deb\nURIs: http://mirror.example.org/debian\nSuites: testing\nComponents: main\n"
        "Signed-By: /usr/share/keyrings/some.gpg\n"
    )


def test_embedded_key_is_kept_whole(etc: Path) -> None:
    key = "\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mQINBF\n -----END PGP PUBLIC KEY BLOCK-----"
    (etc / "sources.list.d" / "debian.sources").write_text(
        f"Types: deb\nURIs: http://m.example.org/debian\nSuites: bookworm\nComponents: main\nSigned-By:{key}\n"
    )
    assert f"Signed-By: {key}\n" in system_mirror(etc, os_release(etc, DEBIAN)).stanza(["sid"])


def test_one_line_source_with_options(etc: Path) -> None:
    (etc / "sources.list").write_text(
        "deb cdrom:[Debian GNU/Linux 12]/ bookworm main\n"
        "# deb http://off.example.org/debian bookworm main\n"
        "deb-src http://source.example.org/debian bookworm main\n"
        "deb [ arch=amd64 signed-by=/k.gpg ] https://on.example.org/debian/ bookworm main non-free # why\n"
    )
    mirror = system_mirror(etc, os_release(etc, DEBIAN))
    assert (mirror.uris, mirror.signed_by, mirror.ubuntu) == ("https://on.example.org/debian/", "/k.gpg", False)


def test_disabled_and_componentless_sources_are_passed_over(etc: Path) -> None:
    (etc / "sources.list.d" / "x.sources").write_text(
        "Enabled: no\nTypes: deb\nURIs: http://off.example.org\nSuites: bookworm\nComponents: main\n\n"
        "Types: deb\nURIs: http://extra.example.org\nSuites: bookworm\nComponents: contrib\n"
    )
    with pytest.raises(LabError, match="no entry for bookworm, component main"):
        system_mirror(etc, os_release(etc, DEBIAN))


def test_the_release_itself_comes_before_a_suite_of_a_vendor(etc: Path) -> None:
    (etc / "sources.list.d" / "z.list").write_text("deb http://debian.example.org/debian bookworm main\n")
    assert system_mirror(etc, os_release(etc, DEBIAN)).uris == "http://debian.example.org/debian"


def test_a_vendor_with_the_same_release_name_is_not_taken_for_the_distribution(etc: Path) -> None:
    (etc / "sources.list.d" / "b.list").write_text("deb https://vendor.example.com/apt bookworm main\n")
    (etc / "sources.list.d" / "z.list").write_text("deb http://debian.example.org/debian stable main\n")
    assert system_mirror(etc, os_release(etc, DEBIAN)).uris == "http://debian.example.org/debian"


def test_ubuntu_needs_universe_for_qemu(etc: Path) -> None:
    (etc / "sources.list.d" / "ubuntu.sources").write_text(
        "Types: deb\nURIs: http://archive.example.org/ubuntu/\nSuites: noble noble-updates\nComponents: main universe\n"
    )
    mirror = system_mirror(etc, os_release(etc, UBUNTU))
    assert mirror.ubuntu
    assert "Components: main universe\n" in mirror.stanza(["devel"])


def test_other_systems_are_told_what_to_do(etc: Path) -> None:
    with pytest.raises(LabError, match=r"Fedora.*--kernel IMAGE"):
        system_mirror(etc, os_release(etc, 'PRETTY_NAME="Fedora Linux 41"\nID=fedora\n'))


@pytest.mark.parametrize(
    ("version", "numbers"),
    [
        ("1:11.1.3+ds-1~bpo13+1", (11, 1, 3)),
        ("7.3.4-1~bpo13+1-lab", (7, 3, 4)),
        ("6.19~rc2-1", (6, 19)),
        ("x", ()),
    ],
)
def test_upstream_version(version: str, numbers: tuple[int, ...]) -> None:
    assert upstream(version) == numbers
