"""Debian's programs, which tests run as they are."""

from __future__ import annotations

import os
import shutil
import sys

import pytest


def program(name: str, package: str) -> str:
    """A program's path; without it the test is skipped, or fails where nothing may be missing.

    What would start as a service if it were installed is unpacked beside the interpreter by `make test`.
    """
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:{sys.prefix}/unpacked/usr/sbin")
    if found is None:
        reason = f"{name} is not here: Debian package {package}"
        if os.environ.get("FASTRECV_REQUIRE_KERNEL") == "1":
            pytest.fail(f"must not be skipped here: {reason}", pytrace=False)
        pytest.skip(reason)
    return found
