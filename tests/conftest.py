"""Shared by all tests: features that a test needs, and what a test leaves running."""

from __future__ import annotations

import os
from errno import EACCES, EPERM

import pytest
from hypothesis import settings

from fastrecv import features
from fastrecv.errors import NotSupported

settings.register_profile("unhurried", deadline=None)  # no example has to be fast: others may use the CPU meanwhile
settings.load_profile("unhurried")

REQUIRED = os.environ.get("FASTRECV_REQUIRE_KERNEL") == "1"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose features are missing, with the reason; where they should be there, that is a failure."""
    for marker in item.iter_markers("needs"):
        for name in marker.args:
            try:
                features.check(name)
            except NotSupported as error:
                defect = features.kernel_version() >= features.FEATURES[name].kernel and error.errno not in (
                    EPERM,
                    EACCES,
                )
                if REQUIRED or defect:
                    pytest.fail(f"must not be skipped here: {error}", pytrace=False)
                pytest.skip(str(error))
