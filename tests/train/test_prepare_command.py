"""`python -m tidal.prepare` in real processes: what it writes, what it survives; Parquet and Hugging Face readers."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import ENVIRONMENT, ROOT, SMALL_TEXT, Ran, run, tidal, tree

from tests.train.test_recipes import some_text
from tidal.cli import UserError
from tidal.prepare import __doc__ as LAYOUT
from tidal.prepare import make
from tidal.prepare.documents import Document, read_documents
from tidal.prepare.shards import verify
from tidal.prepare.survey import survey
from tidal.tokenizer import MixedTokenizer
from tidal.train.presets import SIZES
from tidal.train.recipes.text import TextRecipe

SMALL_SHARDS = """
import time
from tidal.cli import main
from tidal.prepare import __main__ as command, make
from tidal.prepare import reading
make.SHARD, make.PART, reading.PART, submit = {}, 500, 500, make._submit
make._submit = lambda *shard: (time.sleep({}), submit(*shard))[1]
main(command.run, "tidal.prepare")
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and a tokenizer."""
    home = tmp_path_factory.mktemp("home")
    (home / "sea.txt").write_text("".join(some_text(i) for i in range(120)))
    MixedTokenizer.train([some_text(0)], 320).save(home / "t")
    return home


def prepared(home: Path, out: Path, *flags: str, shard: int = 2000, pause: float = 0) -> list[str]:
    return [sys.executable, "-c", SMALL_SHARDS.format(shard, pause), "--data", str(home / "sea.txt"),
            "--tokenizer", str(home / "t"), "--out", str(out), *flags]  # fmt: skip


@pytest.fixture(scope="module")
def whole(home: Path) -> dict[str, str]:
    """What an undisturbed preparation, in one process, leaves."""
    assert run(prepared(home, home / "whole", "--workers", "1"), home).code == 0
    found = tree(home / "whole")
    assert sum(name.startswith("shard-") and "/" not in name for name in found) > 20
    return found


def test_the_documentation_and_that_training_from_shards_is_training_from_files(
    home: Path, tmp_path: Path, command: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands of docs/data.md; then the same data without preparing: the weights are the same, bit for bit."""
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    commands = re.findall(r"^\$ python -m tidal\.(.*)$", text, re.MULTILINE)
    assert [line.split()[0] for line in commands] == ["prepare", "train"]
    (tmp_path / "FOLDER").mkdir()
    shutil.copy(home / "sea.txt", tmp_path / "FOLDER")
    few = (*SMALL_TEXT, "--max-steps", "6", "--validate-every", "6")
    prepare, train = map(shlex.split, commands)
    done = tidal(*prepare, "--vocab-size", "320", cwd=tmp_path)
    assert re.fullmatch(r"SHARDS: 1 documents, 68,237 bytes; 1 held out; vocabulary 320, \d+ writable\n", done.out)
    monkeypatch.chdir(tmp_path)
    assert command(*prepare, "--vocab-size", "320").out == done.out  # it is there already
    named = set(re.findall(r"\b(\w+\.npy|\w+\.json)\b", str(LAYOUT)))
    assert len(named) == 6
    assert named <= {path.name for path in (tmp_path / "SHARDS").rglob("*")}
    assert command("train", "--data", "FOLDER", "--out", "runs/files", *few).code == 0
    at = few.index("--vocab-size")  # which was settled when preparing
    assert "--vocab-size was settled" in command(*train, *few).err
    assert command(*train, *few[:at], *few[at + 2 :]).code == 0
    a, b = ((tmp_path / "runs" / run / "checkpoints" / "step-000006" / "model.safetensors").read_bytes()
            for run in ("text", "files"))  # fmt: skip
    assert a == b


def test_a_vocabulary_smaller_than_the_size_asks_for_is_said(home: Path, whole: dict[str, str],
                                                             capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """Preparing knows nothing of --model-size."""
    settings = SIZES["mini"]
    settings = dataclasses.replace(settings, text=dataclasses.replace(settings.text, prepared=str(home / "whole")))
    said = (f"{home / 'whole'} has a vocabulary of 320, not the 4,096 of --model-size mini; prepare with --vocab-size "
            "4096\n")  # fmt: skip
    for size, there in (("mini", True), (None, False)):
        TextRecipe(dataclasses.replace(settings, model_size=size))
        assert (said in capsys.readouterr().err) == there


def session(leader: int) -> set[int]:
    """The processes that a process and its children are, without those that have ended."""
    found = set()
    for entry in os.listdir("/proc"):
        try:
            ours = entry.isdigit() and os.getsid(int(entry)) == leader
            if ours and Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.add(int(entry))
        except (ProcessLookupError, FileNotFoundError):
            continue
    return found


def wait_for(what: Any, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("whom", ["parent", "worker", "terminal"])
def test_killed_it_leaves_no_process_and_goes_on(home: Path, whole: dict[str, str], tmp_path: Path, whom: str) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(prepared(home, out, "--workers", "2", pause=1), env=ENVIRONMENT,
                               stderr=subprocess.PIPE, start_new_session=True, text=True)  # fmt: skip
    try:
        wait_for(lambda: list(out.glob("shard-*/shard.json")))
        if whom == "terminal":
            os.killpg(process.pid, signal.SIGINT)
        else:
            command = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in session(process.pid)}
            workers = [pid for pid, words in command.items() if b"spawn_main" in words]
            os.kill(process.pid if whom == "parent" else workers[0], signal.SIGKILL)
        _, said = process.communicate(timeout=240)
    finally:
        process.kill()
    wait_for(lambda: not session(process.pid))
    assert not (out / make.MANIFEST).exists()
    assert process.returncode == {"parent": -9, "worker": 2, "terminal": 130}[whom], said
    last = {"parent": "", "worker": "error: a worker was killed", "terminal": "tidal.prepare: interrupted"}
    assert last[whom] in ["", *said.splitlines()][-1]
    assert "Traceback" not in said
    assert run(prepared(home, out, "--workers", "2"), tmp_path).code == 0
    assert tree(out) == whole


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_stops_with_one_line_and_no_half_shard(home: Path, tmp_path: Path, workers: str) -> None:
    out = tmp_path / "out"
    command = prepared(home, out, "--workers", workers, shard=20_000)
    limited = f"ulimit -f 8; exec {shlex.join(command)}"  # files of at most 8 KiB: the tokenizer fits
    done = run(["bash", "-c", limited], tmp_path)
    assert done.code == 2
    assert re.search(r"tidal.prepare: error: cannot write to \S+: File too large; what is finished stays", done.err)
    assert "Traceback" not in done.err
    left = {name.partition("/")[0] for name in tree(out)} - {"plan.json", "tokenizer"}
    assert len(left) <= 2, "only the last shard and the one held out fit"
    for name in left:
        verify(out / name)
    assert run(command, tmp_path).code == 0
    assert make.load(out).training.documents[:, 2].sum() > 60_000


def test_no_space_is_said_before_anything_is_written(home: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    data = survey([str(home / "sea.txt")], 0.05, 0)
    monkeypatch.setattr(make.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=2 * data.n_bytes))
    with pytest.raises(UserError, match="not enough space"):
        make.prepare(data, MixedTokenizer.load(home / "t"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "flags", "words"),
    [
        (b"abc\0", (), "is not text: NUL at byte 3"),
        (b"", (), "no text in"),
        (b"word " * 99, ("missing.txt",), "no such file or folder: 'missing.txt'"),
        (b"word " * 99, ("--hold-out", "2"), "the held out part must lie between 0 and 1, not 2.0"),
        (b"word " * 99, ("--tokenizer", "."), "cannot read tokenizer.json"),
        (b"word " * 99, ("--vocab-size", "7"), "--vocab-size is 7; it must be at least 288"),
        (b"word " * 99, ("--workers", "-1"), "--workers is -1; it must be at least 0"),
        (b"abc\0", ("--out", "a.txt"), "a.txt is there already and holds something else"),  # before it is read
        (b"abc\0", ("--out", "."), "holds something else"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    tmp_path: Path, content: bytes, flags: tuple[str, ...], words: str, command: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "a.txt").write_bytes(content)
    before = tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    done = command("prepare", "--out", "out", "--data", "a.txt", *flags)
    assert done.code == 2
    assert words in done.err.splitlines()[-1]
    assert "Traceback" not in done.err
    assert tree(tmp_path) == before


def test_the_benchmark_runs(home: Path) -> None:
    done = run([sys.executable, "-m", "benchmarks.preparing", "--text", str(home / "sea.txt"), "--mb", "0.1", "--lines",
                "50", "--no-training"], ROOT)  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads(done.lines[-1])
    assert 100_000 <= found["one.txt"]["bytes"] < 101_000
    assert found["many.jsonl"]["prepare"]["peak_mb"][0] > 5
    assert {"processor", "torch", "date"} <= set(found)


def test_a_worker_imports_no_torch(tmp_path: Path) -> None:
    script = "import sys, tidal.prepare.make, tidal.prepare.survey; sys.exit('torch' in sys.modules)"
    assert run([sys.executable, "-c", script], tmp_path).code == 0


# ------------------------------------------------------------------------------------- Parquet, Hugging Face


class FakeBatch(list[dict[str, Any]]):
    def to_pylist(self) -> list[dict[str, Any]]:
        return list(self)


class FakeParquet:
    """As much of pyarrow.parquet.ParquetFile as is used; a file is a Python literal of its columns."""

    def __init__(self, path: Path) -> None:
        words = path.read_text().split()
        if words[0] != "PAR1":
            raise ValueError("Parquet magic bytes not found")
        self.names, self.cells = words[1].split(","), words[2:]
        self.schema_arrow = types.SimpleNamespace(names=self.names)

    def __enter__(self) -> FakeParquet:
        return self

    def __exit__(self, *_: object) -> None: ...

    def iter_batches(self, batch_size: int, columns: list[str]) -> Iterator[FakeBatch]:
        assert batch_size > 1
        rows = [dict(zip(self.names, cell.split(","), strict=True)) for cell in self.cells]
        for i in range(0, len(rows), 2):
            yield FakeBatch({name: row[name] for name in columns} for row in rows[i : i + 2])


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Stand-ins for pyarrow and datasets; returns how load_dataset was called."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None, *, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
        calls.append((path, name, split, streaming))
        if path == "missing":
            raise FileNotFoundError("Dataset 'missing' doesn't exist")
        if path == "script":
            raise RuntimeError("Dataset scripts are no longer supported, but found script.py")
        return ({"text": f"{i} {split}", "id": i} for i in range(5))

    pyarrow, parquet = types.ModuleType("pyarrow"), types.ModuleType("pyarrow.parquet")
    parquet.ParquetFile = FakeParquet  # type: ignore[attr-defined]
    datasets = types.ModuleType("datasets")
    datasets.load_dataset = load_dataset  # type: ignore[attr-defined]
    for module in (pyarrow, parquet, datasets):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def test_parquet(packages: list[tuple[Any, ...]], tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("PAR1 id,text 1,one 2,two 3,three")
    (tmp_path / "b.parquet").write_text("PAR1 prompt,completion,n 1+1=,2,0")
    a, b = tmp_path / "a.parquet", tmp_path / "b.parquet"
    assert list(read_documents([str(tmp_path)])) == [
        Document("", "one", f"{a}:1"), Document("", "two", f"{a}:2"), Document("", "three", f"{a}:3"),
        Document("1+1=", "2", f"{b}:1"),
    ]  # fmt: skip
    b.write_text("PAR1 x,y 1,2")
    with pytest.raises(UserError, match=r"b\.parquet:1 has the wrong keys \('x', 'y'\)"):
        list(read_documents([str(b)]))
    b.write_text("nothing")
    with pytest.raises(UserError, match=r"cannot read \S+b\.parquet: Parquet magic bytes not found"):
        list(read_documents([str(b)]))


def test_hugging_face(packages: list[tuple[Any, ...]]) -> None:
    found = list(read_documents(["hf:who/what", "hf:who/what@en:test:2", "hf:who/what"]))
    assert [d.completion for d in found] == [*(f"{i} train" for i in range(5)), "0 test", "1 test"]
    assert found[-1].source == "hf:who/what@en:test:2:2"
    assert packages == [("who/what", None, "train", True), ("who/what", "en", "test", True)]
    for name, words in (("hf:missing", "cannot fetch hf:missing: Dataset 'missing'"), ("hf:", "'hf:' is no dataset"),
                        ("hf:a:train:x", "is no dataset"),
                        ("hf:script", "cannot fetch hf:script: Dataset scripts")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            list(read_documents([name]))


def test_without_the_packages_one_line_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for name, package in ((str(tmp_path / "a.parquet"), "pyarrow"), ("hf:who/what", "datasets")):
        with pytest.raises(UserError, match=rf'needs {package}: pip install -e "\.\[data\]"'):
            list(read_documents([name]))
