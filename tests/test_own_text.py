"""The commands on a text of one's own, end to end: training, samples, bits per byte, what is garbage."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import tidal as package
from tests.commands import SMALL, SMALL_TEXT, Ran, figures, objects
from tests.laws import check_scores
from tests.train.runs import short_samples
from tidal.blocks import BlockTable, passage, windows
from tidal.doctor.examine import CHECKS
from tidal.infer.__main__ import _before as before
from tidal.infer.__main__ import run as infer
from tidal.infer.score import bits_per_byte
from tidal.train.__main__ import run as train

Command = Callable[..., Ran]
SEA = "the sea comes in and the sea goes out and so it goes on day by day "


@pytest.fixture(scope="module")
def sea(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a run on a text, one line without a line break, easy enough to be learnt in 40 steps; and what was
    said meanwhile."""
    folder = tmp_path_factory.mktemp("sea")
    (folder / "sea.txt").write_text((SEA * 200)[:10_000])
    flags = ("--recipe", "text", "--data", "sea.txt", "--max-steps", "40", "--warmup-steps", "5", "--lr", "1e-2")
    with contextlib.chdir(folder), contextlib.redirect_stderr(io.StringIO()) as said:
        assert train([*flags, *SMALL_TEXT, "--d-model", "32"]) == 0
    return folder, said.getvalue()


@pytest.fixture
def there(sea: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the folder of `sea`."""
    monkeypatch.chdir(sea[0])


@pytest.mark.usefixtures("there")
def test_plain_output_is_the_text_and_nothing_else(command: Command) -> None:
    flags = ("--checkpoint", "runs/text/checkpoints/step-000040", "--prompt", "the sea goes", "the sea comes",
             "--temperature", "0", "--max-new-units", "30")  # fmt: skip
    done = command("infer", *flags)
    assert len(done.lines) == 2
    assert done.lines[0].startswith("the sea goes ")
    assert done.lines[1].startswith("the sea comes ")
    assert done.out.endswith("\n")
    assert done.err == "using runs/text/checkpoints/step-000040\n"


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize(("figure", "flags"), [
    ("bits-per-byte", ()), ("boundary", ("--count", "3", "--context-chars", "40", "--continuation-chars", "20")),
    ("samples", ("--count", "3", "--max-new-units", "9"))])  # fmt: skip
def test_what_was_held_out_is_evaluated_unless_told_otherwise(figure: str, flags: tuple[str, ...], tmp_path: Path,
                                                              command: Command) -> None:  # fmt: skip
    """And it is said where the data are the run's own."""
    whole = Path("sea.txt").read_text()
    own = command("evaluate", figure, *flags, "--json")
    assert own.err.splitlines()[:2] == ["using runs/text/checkpoints/step-000040", "text: the run's held-out text"]
    found = json.loads(own.out)
    tail = whole[-found["bytes"] :] if figure == "bits-per-byte" else whole[-500:]
    (tmp_path / "tail.txt").write_text(tail)
    given = command("evaluate", figure, *flags, "--data", str(tmp_path / "tail.txt"), "--json")
    assert "the run's own" not in given.err
    if figure == "bits-per-byte":
        assert 900 < len(tail) < 1100  # about 1,000 characters of a short text
        assert json.loads(given.out)["bits_per_byte"] == found["bits_per_byte"]
    (tmp_path / "linked.txt").symlink_to(Path("sea.txt").resolve())
    told = command("evaluate", figure, *flags, "--data", str(tmp_path), "--json").err
    assert f"of the run's own data: {Path('sea.txt').resolve()}; unless it was held out, this is no held-out " in told


@pytest.mark.usefixtures("there")
def test_data_that_are_gone_are_asked_for(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path("runs/text").resolve()
    monkeypatch.chdir(tmp_path)
    done = command("evaluate", "bits-per-byte", "--checkpoint", str(folder))
    assert done.code == 2
    assert "no data: what the run was trained on is not there; name files, folders or globs with --data" in done.err


@pytest.mark.usefixtures("there")
def test_evaluate_bits_per_byte(tmp_path: Path, command: Command) -> None:
    lines = [{"text": SEA * 30}, {"prompt": SEA, "completion": SEA}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ("bits-per-byte", "--data", str(tmp_path / "a.jsonl"), "--context", "64")
    (line,) = command("evaluate", *flags, "--json").lines
    values = json.loads(line)
    assert list(values) == ["bits_per_byte", "documents", "bytes", "units", "context", "seconds"]
    assert (values["documents"], values["bytes"], values["context"]) == (2, 31 * len(SEA), 64)
    assert values["units"] > values["bytes"]  # every block end is charged
    assert 0.01 < values["bits_per_byte"] < 2
    model, tokenizer = package.load("runs/text")
    table = BlockTable(tokenizer)
    whole = [passage(table, "", SEA * 30), passage(table, SEA, SEA)]
    for overlap in (0, 32):  # half of each window is context; without, it is dearer
        rows = [[w] for p in whole for w in windows(p, table, 64, 1 << 40, overlap=overlap)]
        same = values["bits_per_byte"] == pytest.approx(bits_per_byte(model, rows, table)[0])
        assert same == (overlap == 32)
    as_trained = command("evaluate", *flags[:3], "--json")
    trained = json.loads(Path("runs/text/config.json").read_text())["text"]["reader_budget"]
    assert json.loads(as_trained.out)["context"] == trained != 512
    assert f"windows of {trained} tokens, as in training; choose others with --context\n" in as_trained.err
    plain = figures(command("evaluate", *flags).lines)
    assert list(plain) == list(values)
    assert plain["bits_per_byte"] == pytest.approx(values["bits_per_byte"], abs=1e-3)


def test_samples_are_turned_the_right_way_round(sea: tuple[Path, str]) -> None:
    folder, said = sea
    samples = objects((folder / "runs/text/samples.jsonl").read_text(encoding="utf-8").splitlines())
    assert len(samples) == 2
    for sample in samples:
        written = str(sample["completion"]).split()
        known = set(SEA.split())
        backwards = {word[::-1] for word in known} - known
        assert sum(word in known for word in written) > 0.8 * len(written) > 10
        assert not backwards & set(written)
        assert f"  {sample['prompt']!r} → {sample['completion']!r}\n" in said  # the same is printed


ENGLISH = "".join(f"Line {i} of a small file; it costs {i * 7} pence, don't you know?\n" for i in range(200))[:10_000]
CHINESE = "今天天气很好，我们去公园玩。你们明天也来吗？" * 152
TINY = tuple(flag for flag in SMALL if flag != "--no-doctor")
SMALL_FILES = {"english": ENGLISH, "chinese": CHINESE, "one line": (SEA * 200)[:10_000].strip()}


@pytest.mark.parametrize(("name", "size"), [("english", ()), ("chinese", TINY), ("one line", TINY)])
def test_ten_kilobytes_need_no_other_flags(name: str, size: tuple[str, ...], tmp_path: Path, command: Command,
                                           monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """But for the size of the model, for the sake of time, and the doctor's checks that do not look at the data."""
    (tmp_path / "file").write_text(SMALL_FILES[name], encoding="utf-8")
    assert 9_000 < (tmp_path / "file").stat().st_size <= 10_100
    monkeypatch.chdir(tmp_path)
    for number in set(CHECKS) - {1, 11} if size else ():
        monkeypatch.delitem(CHECKS, number)
    with short_samples():
        done = command("train", "--recipe", "text", "--data", "file", "--max-steps", "2", *size)
    assert (done.code, done.out) == (0, ""), done.err
    assert (tmp_path / "runs/text/latest").read_text() == "step-000002\n"
    assert json.loads((tmp_path / "runs/text/doctor.json").read_text(encoding="utf-8"))["ok"]
    assert "Before training: all well" in re.sub("<.*?>", "", (tmp_path / "runs/text/report.html").read_text())
    samples = objects((tmp_path / "runs/text/samples.jsonl").read_text(encoding="utf-8").splitlines())
    assert len(samples) == 2
    for sample in samples:
        assert str(sample["prompt"]) in SMALL_FILES[name]
        assert "".join(sample["blocks"]) == sample["completion"]  # type: ignore[arg-type]


@pytest.mark.usefixtures("there")
def test_garbage_is_counted(command: Command) -> None:
    flags = ("--data", "sea.txt", "--count", "6", "--max-new-units", "20", "--json")
    done = command("evaluate", "samples", *flags)
    counted = json.loads(done.out)
    assert list(counted) == ["count", "empty", "ended_at_once", "repeating", "endless", "distinct_blocks", "blocks",
                             "repeating_in_data", "endless_in_data", "seconds"]
    assert counted["count"] == 6
    assert all(0 <= counted[name] <= 1 for name in ("empty", "ended_at_once", "repeating", "endless"))


def test_folders_prompts_and_gzip(sea: tuple[Path, str], tmp_path: Path, command: Command,
                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Several kinds of data in one run, with the tokenizer of another."""
    folder = tmp_path / "data" / "deep"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text(SEA * 20)
    (folder / "b.md.gz").write_bytes(gzip.compress((SEA * 21).encode()))
    pairs = [{"prompt": f"{i} ", "completion": f"{SEA}{i}\n"} for i in range(40)]
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(p) + "\n" for p in pairs).encode()))
    data = ("--data", "data", str(tmp_path / "c.jsonl.*"))
    tokenizer = ("--tokenizer", str(sea[0] / "runs/text/tokenizer"))
    monkeypatch.chdir(tmp_path)
    at = SMALL_TEXT.index("--vocab-size")  # which is the tokenizer's
    small = SMALL_TEXT[:at] + SMALL_TEXT[at + 2 :]
    with short_samples():
        done = command("train", *data, *tokenizer, "--max-steps", "3", *small, "--out", "here")
    assert done.code == 0, done.err
    (read,) = re.findall(r"^([\d,]+) documents, ", done.err, re.MULTILINE)
    assert 30 <= int(read) < 42  # the others are held out
    assert "training the tokenizer" not in done.err
    model, its_tokenizer = package.load(tmp_path / "here")
    assert its_tokenizer.fingerprint == package.MixedTokenizer.load(tokenizer[1]).fingerprint
    assert model.config.shape.suffix_rows == 500


def test_a_streamed_text_ends_before_a_stop_string(sea: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    """It comes piece by piece, and no part of a stop string with it, wherever blocks end."""
    flags = ["--checkpoint", str(sea[0] / "runs/text"), "--prompt", "the sea", "--max-new-units", "60", "--seed", "2"]
    infer(flags)
    text = capsys.readouterr().out.removeprefix("the sea")
    for stop in ([text[n : n + 3] for n in (0, 5, 20)], [text[9:14]], ["zzz"], [text[-3:-1], "zz"]):
        infer([*flags, "--stop", *stop])
        wanted = capsys.readouterr().out
        infer([*flags, "--stream", "--stop", *stop])
        assert capsys.readouterr().out == wanted
    assert [before("and so it", stop) for stop in ((), ("so",), ("it goes",), ("d", "x" * 20))] == [9, 4, 3, 0]


def test_three_ways_to_score_agree_on_a_trained_run(sea: tuple[Path, str]) -> None:
    check_scores(*package.load(sea[0] / "runs/text"))
