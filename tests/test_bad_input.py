"""Bad input: exit code 2, one clear line on standard error, nothing on standard output, nothing written."""

from __future__ import annotations

import gzip
import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import SMALL, Ran, assert_refused, run, tree

from tests.train.runs import short_samples
from tidal import checkpoint


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder but for some files, most of them bad."""
    for name, data in {
        "good.txt": b"All of this is text.\n" * 40,
        "empty.txt": b"",
        "blank.txt": b" \n\t\r\n",
        "binary.dat": bytes(range(256)),
        "latin.txt": "Größe".encode("latin-1"),
        "marked.txt": b"\xef\xbb\xbfab\xff",
        "utf16.txt": "text".encode("utf-16"),
        "cut.txt.gz": gzip.compress(b"text" * 100)[:-9],
        "plain.gz": b"this was never packed",
        "broken.jsonl": b'{"text": "fine"}\n{"text": \n',
        "keys.jsonl": b'{"content": "x"}\n',
        "surrogate.jsonl": b'{"text": "a\\ud800"}\n',
        "unanswered.jsonl": b'{"prompt": "1 + 1 =", "completion": ""}\n',
        "one.txt": b"a",
    }.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


TEXT = "train --recipe text"
BITS = "evaluate bits-per-byte"
CASES = {
    # data that is no data
    f"{TEXT} --data missing.txt": r"no such file or folder: 'missing.txt'",
    f"{TEXT} --data folder": "no text in 'folder'",
    f"{TEXT} --data good.txt ./folder --out folder": "--out folder is the folder of the data ./folder; give the run a",
    f"{TEXT} --data *.nothing": r"no file matches '\*.nothing'",
    f"{TEXT} --data empty.txt": "no text in 'empty.txt'",
    f"{TEXT} --data blank.txt": "no text in 'blank.txt'",
    f"{TEXT} --data good.txt empty.txt": "no text in 'empty.txt'",
    f"{TEXT} --data good.txt --validation-data missing.txt": r"no such file .*'missing.txt' .*; check the path",
    f"{TEXT} --data binary.dat": "binary.dat is not text: NUL at byte 0",
    f"{TEXT} --data latin.txt": r"latin.txt is not text: invalid UTF-8 \(0xf6\) at byte 2",
    f"{TEXT} --data utf16.txt": "utf16.txt is not text: .*UTF-16: convert it",
    f"{TEXT} --data cut.txt.gz": "cut.txt.gz is not intact gzip",
    f"{TEXT} --data plain.gz": "plain.gz is not intact gzip",
    f"{TEXT} --data broken.jsonl": "broken.jsonl:2 is not JSON: Expecting value at column 9; every",
    f"{TEXT} --data keys.jsonl": r"keys.jsonl:1 has the wrong keys \('content'\)",
    f"{TEXT} --data surrogate.jsonl": r"surrogate.jsonl:1: 'text' has a lone surrogate \(\\ud800\) at character 1",
    f"{TEXT} --data one.txt": "too little data",
    f"{TEXT} --data good.txt --tokenizer folder": "cannot read folder/tokenizer.json",
    f"{TEXT} --data /dev/null": "no text in '/dev/null', which is no file: data are read more than once",
    TEXT: "--recipe text needs --data",
    "train --recipe addition --data good.txt": "--data goes with --recipe text",
    "train --data good.txt --recipe addition": "--data goes with --recipe text",
    f"{TEXT} --data good.txt --aux-weight 0": "--aux-weight is 0, .* give --no-foretell, too",
    "train --recipe characters --data good.txt": "the characters recipe makes its own data",
    f"{BITS} --data missing.txt": "no such file or folder: 'missing.txt'",
    f"{BITS} --data empty.txt": "no text in 'empty.txt'",
    f"{BITS} --data binary.dat": "binary.dat is not text",
    BITS: "no runs found under runs/",
    # prompts that are none
    "infer --prompt-file missing.txt": "cannot read prompts from 'missing.txt': No such file",
    "infer --prompt-file folder": "cannot read prompts from 'folder': Is a directory",
    "infer --prompt-file empty.txt": "no prompts in empty.txt",
    "infer --prompt-file latin.txt": "latin.txt is not UTF-8 text: byte 2 is 0xf6",
    "infer --prompt-file marked.txt": "marked.txt is not UTF-8 text: byte 5 is 0xff",
    "infer --prompt a --prompt-file good.txt": "both --prompt and --prompt-file",
    "infer --prompt a\udcff": r"--prompt 'a\\udcff': lone surrogate U\+DCFF at offset 1",
    # flags
    "train --max-step 5": "unknown flag '--max-step'; did you mean '--max-steps'",
    f"{TEXT} --dta good.txt": "unknown flag '--dta'; did you mean '--data'",
    "infer --promt a": "unknown flag '--promt'; did you mean '--prompt'",
    "evaluate addition --cuont 5": "unknown flag '--cuont'; did you mean '--count'",
    "evaluate additon": "unknown evaluation 'additon'; "
                        "choose one of addition, bits-per-byte, boundary, characters, samples",
    "evaluate": "nothing to evaluate; choose one of addition, bits-per-byte, boundary, characters, samples",
    "train --recipe adition": "--recipe must be one of 'addition', 'characters', 'text', not 'adition'",
    "train 500": "unexpected argument '500'",
    # places
    "train --out good.txt/run": "cannot write the run folder good.txt/run: .*good.txt is not a folder; .*--out",
    "train --out good.txt": "cannot write the run folder good.txt: .*good.txt is not a folder; .*--out",
    "infer --prompt a": "no runs found under runs/; train one with: python -m tidal.train",
    "evaluate addition": "no runs found under runs/",
    "evaluate characters": "no runs found under runs/",
    "evaluate characters --count 0": "--count is 0; it must be at least 1",
    f"{BITS} --data good.txt": "no runs found under runs/",
    "infer --prompt a --checkpoint nowhere": "nowhere does not exist",
    "infer --prompt a --checkpoint folder": "folder is not a run or checkpoint folder",
    "infer --prompt a --checkpoint good.txt": "good.txt is not a run or checkpoint folder",
    "evaluate addition --checkpoint folder": "folder is not a run or checkpoint folder",
    "train --device abacus": "device 'abacus' cannot be used",
    "train --device cuda:99": "device 'cuda:99' cannot be used",
    "train --device hpu": "device 'hpu' cannot be used .No module named 'torch.hpu'.; try --device cpu",
    "infer --prompt a --device cpu --cuda-graphs": "--cuda-graphs needs a CUDA device, not cpu; leave it out",
    "infer --prompt a --trace - --cuda-graphs": "--cuda-graphs does nothing with --trace",
    "infer --prompt a --device abacus": "device 'abacus' cannot be used",
    f"train --out {300 * 'a'}": "cannot write the run folder a+: File name too long; choose another with --out",
    "train --device meta": "device 'meta' cannot be used",
    # flags that would do nothing
    "train --vocab-size 999": "--vocab-size goes with --recipe text, not addition",
    f"{TEXT} --data good.txt --digits 7": "--digits goes with --recipe addition, not text",
    f"{TEXT} --prepared folder --hold-out 0.2": "--hold-out was settled when folder was prepared",
    f"{TEXT} --prepared folder --validation-data good.txt": "--validation-data was settled when folder was prepared",
    f"{TEXT} --data good.txt --validation-data good.txt --hold-out 0.2": "--hold-out does nothing with --valid",
    "prepare --out x --data good.txt --validation-data good.txt --hold-out 0.2": "--hold-out does nothing with",
    f"{TEXT} --data good.txt --step-window 4": "--step-window does nothing with --writer-attention none",
    f"{TEXT} --data good.txt --step-stride 1": "--step-stride does nothing with --writer-attention none",
    f"{TEXT} --data good.txt --tokenizer folder --vocab-size 999": "--vocab-size does nothing with --tokenizer folder",
    "prepare --out x --data good.txt --tokenizer folder --vocab-size 999": "--vocab-size does nothing with --tokenizer",
    f"{TEXT} --prepared shards --cache elsewhere": "--cache does nothing with --prepared shards",
    "train --no-qk-norm --query-gain 3": "--query-gain does nothing with --no-qk-norm",
    "train --no-qk-norm --sharpen 1": "--sharpen does nothing with --no-qk-norm",
    "train --parallel fsdp": "--parallel does nothing with a single process; start several with torchrun",
    # numbers
    **{
        f"train --{flag} {value}": f"^(--{flag} (is|needs)|model: {flag.replace('-', '_')} is) "
        for flag, values in {
            "max-steps": "0 -3 1.5 many", "rows": "0", "validate-every": "0", "keep": "0", "threads": "-1 100000",
            "seed": "-1 18446744073709551616", "max-seconds": "nan -1", "lr": "nan inf -1", "clip": "nan 0",
            "beta2": "1", "weight-decay": "-1", "decay-fraction": "2", "accumulate": "0", "aux-weight": "nan",
            "warmup-steps": "-1", "digits": "0 200 4400",
            "max-block-units": "3 200000", "step-stride": "nan -1", "d-model": "0", "n-heads": "0",
            "reader-layers": "-1", "place-jitter": "-1 200000", "suffix-rows": "-1", "table-lr-scale": "nan",
        }.items()
        for value in values.split()
    },
    "train --d-model 64 --n-heads 3": "d_model 64 is not a multiple of n_heads 3",
    "train --n-heads 4 --n-kv-heads 3": "n_heads 4 is not a multiple of n_kv_heads 3",
    f"{TEXT} --data good.txt --cut-probability 2": "--cut-probability is 2.0; it must be between 0 and 1",
    f"{TEXT} --data good.txt --hold-out 1.5": "held out part must lie between 0 and 1, not 1.5",
    f"{TEXT} --data good.txt --vocab-size 10": "--vocab-size is 10; it must be at least 288",
    f"{TEXT} --data good.txt --reader-budget 0": "--reader-budget is 0; it must be at least 16",
    "infer --prompt a --temperature nan": "temperature is nan",
    "infer --prompt a --temperature -1": "temperature is -1.0",
    "infer --prompt a --top-p 2": "top_p is 2.0",
    "infer --prompt a --top-p nan": "top_p is nan",
    "infer --prompt a --top-k -1": "top_k is -1",
    "infer --prompt a --num-beams 2 --length-penalty nan": "length_penalty is nan; it must be a finite number",
    "infer --prompt a --num-beams 2 --length-penalty 11": "length_penalty is 11.0; it must be a number from 0 to 10",
    "infer --prompt a --num-samples 0": "--num-samples is 0; it must be at least 1",
    "infer --prompt a --max-new-units 0": "--max-new-units is 0; it must be at least 1",
    "infer --prompt a --seed -1": "--seed is -1; it must be at least 0",
    "infer --prompt a --checkpoint=": r"^\. is not a run or checkpoint folder",  # of a variable that is not set
    "infer --prompt -- a": "'--' is no flag",
    # flags of which one would do nothing
    **{
        f"infer --prompt a --num-beams 2 --{flag}": f"--{flag.split()[0]} does nothing with --num-beams"
        for flag in ("stop x", "max-new-blocks 1", "log-probs", "stream", "trace t.html", "temperature 1", "top-k 3",
                     "seed 5")
    },
    **{
        f"infer --prompt a --trace t.html --{flag}": f"--{flag.split()[0]} does nothing with --trace"
        for flag in ("json", "stream", "batch-size 2")
    },
    **{
        f"infer --prompt a {flags} --trace -": "--trace shows one of 2 completions; .* --trace-number, from 0 to 1$"
        for flags in ("b", "--num-samples 2")
    },
    "infer --prompt a b --num-samples 3 --trace - --trace-number 6": "--trace-number is 6; it must be at most 5",
    "infer --prompt a --trace - --trace-number -1": "--trace-number is -1; it must be at least 0",
    "infer --prompt a b --trace-number 1": "--trace-number does nothing without --trace",
    **{
        f"infer --prompt a --temperature 0 --{flag}": f"--{flag.split()[0]} does nothing with --temperature 0; leave"
        for flag in ("num-samples 2", "top-k 3", "top-p 0.5", "min-p 0.1", "seed 0")
    },
    "infer --prompt a --log-probs": "--log-probs does nothing without --json",
    "infer --prompt a b --stream": "--stream does nothing with 2 completions; leave it out, or give --json, too",
    "infer --prompt a --stream --num-samples 3": "--stream does nothing with 3 completions",
    "infer --prompt a --length-penalty 2": "--length-penalty does nothing without --num-beams",
    "infer --prompt a --num-beams 2 --num-samples 3": "--num-samples is 3; of 2 beams there are no more",
    "infer --prompt a --trace notes.md": "--trace is 'notes.md'; give a file that ends in .html",
    "evaluate addition --count 0": "--count is 0; it must be at least 1",
    "evaluate addition --digits 4001": "--digits is 4001; it must be at most 4000",
    "evaluate samples --count 1000000001": "--count is 1000000001; it must be at most 1000000000",
    "evaluate addition --seed -1": "--seed is -1; it must be at least 0",
    "evaluate samples --prompt-blocks 0": "--prompt-blocks is 0; it must be at least 1",
    "evaluate samples --seed -1": "--seed is -1; it must be at least 0",
    "evaluate boundary --seed -1": "--seed is -1; it must be at least 0",
    f"{BITS} --data good.txt --context 3": "--context is 3; it must be at least 16",
}  # fmt: skip


@pytest.mark.parametrize("line", CASES)
def test_bad_input_is_refused_in_one_line(line: str, here: Path, command: Callable[..., Ran]) -> None:
    before = tree(here)
    module, *arguments = line.split()
    assert_refused(command(module, *arguments), module, CASES[line])
    assert tree(here) == before


@pytest.mark.parametrize("line", ["train --rows 0", "evaluate addition --cuont 5"])  # before torch is imported
def test_so_it_is_in_a_real_process(line: str, here: Path) -> None:
    before = tree(here)
    module, *arguments = line.split()
    done = run([sys.executable, "-m", f"tidal.{module}", *arguments], here)
    assert_refused(done, module, CASES[line])
    assert tree(here) == before


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        ((b"--prompt", b"1 + 1 =", b"a\xff"), "", r"--prompt 'a\\udcff': lone surrogate U\+DCFF at offset 1"),
        ((), "", "no prompts in standard input"),
    ],
    ids=["bytes", "nothing"],
)
def test_prompts_of_a_real_process(arguments: tuple[bytes, ...], stdin: str, message: str, here: Path) -> None:
    before = tree(here)
    done = run([sys.executable, "-m", "tidal.infer", *arguments], here, stdin, {"PYTHONUTF8": "1"})
    assert_refused(done, "infer", message)
    assert tree(here) == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{BITS} --data unanswered.jsonl", "no text to score"),
        (BITS, "no data: this model was not trained on text; .*--data"),
        ("evaluate addition --digits 15", "--digits is 15; this model writes blocks of 16 units: at most 14 digits"),
    ],
)
def test_what_an_intact_model_cannot_do(
    line: str, message: str, trained: Path, here: Path, command: Callable[..., Ran]
) -> None:
    shutil.copytree(trained, here, dirs_exist_ok=True)
    before = tree(here)
    module, *arguments = line.split()
    assert_refused(command(module, *arguments), module, message)
    assert tree(here) == before


def test_an_evaluation_without_memory(trained: Path, here: Path, command: Callable[..., Ran],
                                      monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """A batch too large for a GPU, say."""
    def generate(*given: object, **more: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.00 GiB.\nSee the manual")

    monkeypatch.setattr("tidal.train.recipes.generate", generate)
    shutil.copytree(trained, here, dirs_exist_ok=True)
    message = (r"^out of memory \(CUDA out of memory. Tried to allocate 6.00 GiB.\) for the evaluation addition; try "
               r"smaller numbers \(see --help\), or another --device$")  # fmt: skip
    assert_refused(command("evaluate", "addition", "--digits", "2"), "evaluate", message)


def test_a_folder_without_a_complete_checkpoint(here: Path, command: Callable[..., Ran]) -> None:
    (here / "runs/new/checkpoints/step-000010.tmp").mkdir(parents=True)
    message = r"runs/new has no complete checkpoint \(yet\)"
    assert_refused(command("infer", "--prompt", "a", "--checkpoint", "runs/new"), "infer", message)
    assert_refused(command("infer", "--prompt", "a"), "infer", "no runs found under runs/")


def test_a_jsonl_line_of_the_documented_form_is_good(here: Path) -> None:
    """The control: what is refused above is refused for its own sake."""
    (here / "fine.jsonl").write_text("".join(json.dumps({"text": f"This is line {i}. "}) + "\n" for i in range(50)))
    train = importlib.import_module("tidal.train.__main__").run
    with short_samples():
        train(["--data", "fine.jsonl", "good.txt", "--max-steps", "1", "--rows", "2", *SMALL])
    assert checkpoint.resolve(None).name == "step-000001"
