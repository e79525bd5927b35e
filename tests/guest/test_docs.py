"""The pages' snippets that need a kernel run on the lab's devices; those that any device does run on a real one too."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vfiopy
from tools._docs.snippets import DEVICES, PAGES, TREE, run, snippets

PLACES = ("run on", "guest", "guest bound")
WITH_SNIPPETS = [page for page in PAGES if any(one.place in PLACES for one in snippets(page))]


@pytest.fixture
def shared_nodes_stay() -> Iterator[None]:
    """Whose /dev/iommu and /dev/vfio/vfio are is the machine's, not a page's."""
    before = {path: path.stat() for path in (Path("/dev/iommu"), Path("/dev/vfio/vfio"))}
    yield
    for path, was in before.items():
        os.chown(path, was.st_uid, was.st_gid)
        path.chmod(was.st_mode)


@pytest.mark.usefixtures("shared_nodes_stay")
@pytest.mark.parametrize("page", WITH_SNIPPETS, ids=lambda page: str(page.relative_to(TREE)))
def test_page_runs(
    page: Path, bdf: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "snippet"}
    for snippet in snippets(page):
        if snippet.place not in PLACES:
            continue
        real = {text: bdf(*DEVICES[name]) for text, name in snippet.devices.items() if name in DEVICES}
        with contextlib.ExitStack() as stack:
            for address in real.values() if snippet.place != "guest" else ():
                stack.enter_context(vfiopy.bind(address))
            run(snippet, namespace, {**snippet.devices, **real})
