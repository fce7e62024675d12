"""Freed memory is kept: large blocks are not mapped anew each time."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
if sys.argv[1] == "keep":
    from tidal.allocator import keep_memory
    keep_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytes(memoryview(b"x" * (16 << 20)))  # written to: every page is touched
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(min(faults() for _ in range(5)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
def test_large_blocks_are_kept() -> None:
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "default")
    )
    assert kept < given_back / 4, (kept, given_back)
