"""For all tests: one thread (tiny tensors are slower on several) and no deadlines (machines are shared).

Without a GPU, Triton kernels run in Triton's interpreter, which has to be said before triton is first imported.

Examples are random on a person's machine, where a rare failure is a find, and fixed in CI, where it is noise.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import SMALL, Ran
from hypothesis import HealthCheck, settings

from tidal import cli

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `from tests.… import`, however pytest is started
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in jobs that a script runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
settings.register_profile(
    "tidal", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("tidal")

LONGEST = ("test_readme", "test_parallel", "test_doctor", "test_triton_aot", "test_triton_attention",
           "test_mutants", "test_stand_in_gpu", "test_commands", "test_own_text", "test_triton_planted_bugs",
           "test_engine", "test_triton_operator", "test_resume", "test_recorded", "test_laws", "test_continue",
           "test_workers", "test_beam", "test_faults", "test_prepare_command", "test_watch")  # fmt: skip
"""Files that take about half a minute or more, longest first, and the one that would come last: a process that began
it then would be the only one at work."""

if importlib.util.find_spec("triton") is None:  # off Linux on x86-64; tests/kernels/conftest.py has the others
    collect_ignore = ["test_attention_problems.py", "test_kernel_benchmarks.py", "test_stand_in_gpu.py",
                      "test_tile_benchmark.py"]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a GPU first, which may be lent for minutes; then the files of `LONGEST`, the others in their order."""
    items.sort(key=lambda item: (item.get_closest_marker("gpu") is None,
                                 [*LONGEST, item.path.stem].index(item.path.stem)))  # fmt: skip


def pytest_exception_interact(call: pytest.CallInfo[None]) -> None:
    """End a process of pytest-xdist to which CUDA is lost, for another to take its place: every later test that uses
    the GPU would fail. What failed has been reported by now."""
    cuda_is_lost = importlib.import_module("benchmarks.clock").cuda_is_lost
    if "PYTEST_XDIST_WORKER" in os.environ and call.excinfo and cuda_is_lost(call.excinfo.value):
        os._exit(1)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run in it, to be copied before it is changed. It has learnt nothing: blocks end at the cap."""
    folder = tmp_path_factory.mktemp("trained")
    train = importlib.import_module("tidal.train.__main__").run
    short = ("--max-steps", "1", "--rows", "2", "--max-block-units", "16")
    with importlib.import_module("tests.train.runs").short_samples():
        train([*short, *SMALL, "--out", str(folder / "runs/addition")])
    return folder


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs a command as `python -m tidal.MODULE` does, without the wait for a process and torch."""

    def run_here(module: str, *arguments: str) -> Ran:
        with pytest.raises(SystemExit) as stop:
            cli.main(importlib.import_module(f"tidal.{module}.__main__").run, f"tidal.{module}", arguments)
        assert isinstance(stop.value.code, int)
        return Ran(stop.value.code, *capfd.readouterr())

    return run_here
