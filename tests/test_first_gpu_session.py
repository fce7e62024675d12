"""The script for a GPU that is lent for minutes: it fits into the lease, its commands exist, and it loses nothing."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import attention, attention_tiles, decoding
from tests.commands import ROOT, run

SCRIPT = ROOT / "benchmarks" / "first_gpu_session.sh"
KILL_S = 5
LEASE_S, START_S, COMMAND_S, SPARE_S = 900, 120, 585, 100
FILES = 8


def steps() -> dict[str, tuple[int, list[str]]]:
    """Seconds and arguments of every step."""
    text = SCRIPT.read_text().replace("\\\n", " ")
    assert f"--kill-after={KILL_S} " in text
    found = [shlex.split(line) for line in re.findall(r"^step .*$", text, re.MULTILINE)]
    return {name: (int(seconds), arguments) for _, name, seconds, _python, *arguments in found}


def test_it_fits_into_the_lease() -> None:
    assert list(steps()) == ["tests", "race", "decoding", "tiles"]
    assert f"--kill-after={KILL_S} {steps()['tests'][0]} " in SCRIPT.read_text()  # the text, beside the tests
    seconds = [limit + KILL_S for limit, _ in steps().values()]
    assert sum(seconds) <= COMMAND_S
    assert sum(seconds) + START_S <= LEASE_S - SPARE_S
    for name in ("race", "decoding", "tiles"):  # and each step ends by itself before it is ended
        limit, arguments = steps()[name]
        assert float(arguments[arguments.index("--budget-s") + 1]) + 20 <= limit


@pytest.mark.parametrize(
    ("name", "module"), [("race", attention), ("decoding", decoding), ("tiles", attention_tiles)]
)
def test_flags_are_accepted(name: str, module: object, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                            monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    _, (minus_m, command, *flags) = steps()[name]
    assert (minus_m, command) == ("-m", module.__name__)  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        module.main([x.replace("$out", str(tmp_path)) for x in flags])  # type: ignore[attr-defined]
    assert stop.value.code == 2
    assert "no GPU here" in capsys.readouterr().err  # said after the flags were read


def test_the_tests_are_there() -> None:
    _, arguments = steps()["tests"]
    assert arguments[:2] == ["-m", "pytest"]
    assert "-x" not in arguments
    names = [x for x in arguments if x.startswith("tests/")]
    assert names
    for path, _, function in (name.partition("::") for name in names):
        assert f"def {function}(" in (ROOT / path).read_text() if function else (ROOT / path).exists()
    marked = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")
              if re.search(r"^@?\s*.*pytest\.mark\.gpu", path.read_text(), re.MULTILINE)}  # fmt: skip
    assert marked - {"tests/test_first_gpu_session.py"} <= {name.partition("::")[0] for name in names}


def test_what_needs_a_gpu_comes_first(request: pytest.FixtureRequest) -> None:
    """Of all tests that were collected with this one."""
    others = [item.get_closest_marker("gpu") is None for item in request.session.items]
    assert others == sorted(others)


def test_a_test_that_loses_cuda_fails_alone(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("from tests.conftest import pytest_exception_interact\n")
    (tmp_path / "test_it.py").write_text(
        "lost = []\n"
        "def test_first():\n    lost.append(1)\n    raise RuntimeError('CUDA error: an illegal memory access')\n"
        "def test_second():\n    assert not lost\n"
    )
    command = [sys.executable, "-m", "pytest", "-n", "1", "-v", "-p", "no:cacheprovider", str(tmp_path)]
    done = run(command, tmp_path, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PYTEST_XDIST_WORKER": ""})
    assert "RuntimeError: CUDA error: an illegal memory access" in done.out
    assert "PASSED test_it.py::test_second" in done.out, done.out + done.err


def test_a_step_that_fails_or_hangs_loses_nothing(tmp_path: Path) -> None:
    """With another program in place of Python: it fails, and hangs after it has saved what it found."""
    program, out = tmp_path / "python", tmp_path / "out"
    program.write_text(
        '#!/bin/sh\necho "$@"\ncase "$2" in\npytest) exit 1;;\nignore) sleep 0.5; echo prose;;\n'
        "*attention) echo '{}' >\"$OUT/race.json\"; exec sleep 60;;\n"
        '*decoding) grep prose "$OUT/english.txt";;\nesac\n'
    )
    program.chmod(0o755)
    quick = tmp_path / "benchmarks" / SCRIPT.name
    quick.parent.mkdir()
    quick.write_text(re.sub(r"^step (\w+) \d+", r"step \1 1", SCRIPT.read_text(), flags=re.MULTILINE))
    done = run(["bash", str(quick)], tmp_path, env={"OUT": str(out), "PYTHON": str(program)})
    assert done.code == 1
    assert re.findall(r"== (\w+): exit code (\d+)", done.out) == [
        ("tests", "1"), ("race", "124"), ("decoding", "0"), ("tiles", "0")
    ]  # fmt: skip
    assert (out / "tests.txt").read_text().startswith("-m pytest -n 12")
    assert (out / "decoding.txt").read_text().endswith("prose\n")  # which it had waited for
    saved = {path.name for path in out.iterdir()}
    named = {x.removeprefix("$out/") for _, arguments in steps().values() for x in arguments if x.startswith("$out/")}
    assert len(saved | named) <= FILES


def test_it_asks_for_a_folder(tmp_path: Path) -> None:
    done = run(["bash", str(SCRIPT)], tmp_path, env={"OUT": ""})
    assert done.code != 0
    assert "set OUT to the folder that the results go to" in done.err
