"""Settings for every test."""

from __future__ import annotations

import gc
import os

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("default", max_examples=100, deadline=None)
settings.register_profile(
    "nightly", max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("VFIOPY_PROFILE", "default"))


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> None:
    """What lives through a file's tests is looked through once: many tests collect, and that was most of their time."""
    gc.collect()
    gc.freeze()
