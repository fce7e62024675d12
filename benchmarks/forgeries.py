"""Checkpoints that were damaged by accident or forged on purpose, for `benchmarks.faults`: each must be refused."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tidal import checkpoint
from tidal.cli import UserError
from tidal.doctor.examine import examine_checkpoint
from tidal.infer.load import load
from tidal.train.loop import Run, make_recipe
from tidal.train.resume import look_in
from tidal.train.stop import Stop


def damage(folder: Path, flips: int, truncations: int, rng: np.random.Generator) -> dict[str, Any]:
    """Flip bits and cut files of a checkpoint, all files in turn; each must be refused with the file's name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    missed: list[str] = []
    for n in range(flips + truncations):
        path = files[n % len(files)]
        data = path.read_bytes()
        spoilt = bytearray(data)
        if n < flips:
            at = int(rng.integers(8 * len(data)))
            spoilt[at // 8] ^= 1 << at % 8
        else:
            del spoilt[int(rng.integers(len(data))) :]
        path.write_bytes(spoilt)
        said = ""
        try:
            checkpoint.read_checkpoint(folder)
        except UserError as error:
            said = str(error)
        name = path.relative_to(folder).as_posix()
        if f"is damaged: {name}" not in said:
            missed.append(f"{name}: {said or 'loaded'}")
        path.write_bytes(data)
    checkpoint.read_checkpoint(folder)  # the control
    return {"files": len(files), "flips": flips, "truncations": truncations, "missed": missed}


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


def seal(folder: Path, more: dict[str, str] | None = None) -> None:
    """Give a folder the manifest that fits it, as a forger would, with entries of his own."""
    step = int(folder.name.removeprefix("step-"))
    files = {**checkpoint._hashes(folder), **(more or {})}
    (folder / checkpoint.MANIFEST).write_text(checkpoint._manifest(step, files))


def header(values: object, size: int | None = None, data: bytes = b"") -> bytes:
    """A safetensors file with this header."""
    text = json.dumps(values).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def forgeries(outside: Path) -> dict[str, Callable[[Path], None]]:
    """What is done to a checkpoint folder; `outside` is a folder that none of it may reach."""
    secret = outside / "secret.txt"

    def replaced(name: str, data: bytes) -> Callable[[Path], None]:
        def forge(folder: Path) -> None:
            (folder / name).write_bytes(data)
            seal(folder)

        return forge

    def shape(**sizes: int) -> Callable[[Path], None]:
        def forge(folder: Path) -> None:
            config = json.loads((folder / "config.json").read_text())
            replaced("config.json", json.dumps({**config, "shape": {**config["shape"], **sizes}}).encode())(folder)

        return forge

    def link(name: str, target: Path) -> Callable[[Path], None]:
        def forge(folder: Path) -> None:
            shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
            (folder / name).symlink_to(target)
            seal(folder)

        return forge

    def listed(name: str) -> Callable[[Path], None]:
        return lambda folder: seal(folder, {name: hashlib.sha256(secret.read_bytes()).hexdigest()})

    def pipe(folder: Path) -> None:
        (folder / "config.json").unlink()
        os.mkfifo(folder / "config.json")

    bomb = pickle.dumps(Bomb(outside / "executed"))
    tensor = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
    return {
        "name that climbs out": listed("../../../outside/secret.txt"),
        "absolute name": listed(str(secret)),
        "link to a file outside": link("model.safetensors", outside / "model.safetensors"),
        "link to a folder outside": link("tokenizer", outside / "tokenizer"),
        "named pipe": pipe,
        "pickle as weights": replaced("model.safetensors", bomb),
        "pickle as optimizer": replaced(checkpoint.OPTIMIZER, bomb),
        "pickle as settings": replaced("trainer.json", bomb),
        "pickle as tokenizer": replaced("tokenizer/tokenizer.model", bomb),
        "header of 2^63 bytes": replaced("model.safetensors", header({}, size=2**63)),
        "tensor of 4 TB": replaced("model.safetensors", header({"reader_norm.weight": tensor})),
        "shape that overflows": replaced("model.safetensors", header({"x": {**tensor, "shape": [2**63, 4]}})),
        "offsets that go back": replaced("model.safetensors", header({"x": {**tensor, "data_offsets": [8, 0]}})),
        "optimizer with an absurd header": replaced(checkpoint.OPTIMIZER, header({}, size=2**40)),
        "moments of other shapes": replaced(checkpoint.OPTIMIZER, header(
            {"0.0.momentum_buffer": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, data=bytes(4))),
        "nesting without end": replaced("trainer.json", b"[" * 200_000),
        "state of wrong types": replaced("trainer.json", json.dumps({"step": "1", "settings": []}).encode()),
        "digits without end": replaced("trainer.json", json.dumps(
            {"step": 1, "settings": {"recipe": "addition", "seed": 0, "addition": {"digits": 10**9}}}).encode()),
        "layers without end": shape(reader_layers=10**12),
        "layers as wide as memory": shape(d_model=2**40, reader_ff=2**40),
        "places without end": shape(place_jitter=10**12),
        "number without end": replaced("config.json", b'{"vocab_size": ' + b"9" * 10_000 + b"}"),
    }  # fmt: skip


def forged(home: Path, source: Path) -> dict[str, Any]:
    """Load, resume and examine each forgery: one must refuse, in one line, and nothing outside may change."""
    accepted: list[str] = []
    outside = home / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    shutil.copy(source / "model.safetensors", outside)
    shutil.copytree(source / "tokenizer", outside / "tokenizer")
    before = {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()}
    cases = forgeries(outside)
    for name, forge in cases.items():
        folder = home / "forged" / "checkpoints" / source.name
        shutil.copytree(source, folder)
        forge(folder)
        refused = 0
        for use in (load, _resume, _examine):
            try:
                use(folder)
            except UserError:
                refused += 1
        after = {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()}
        if not refused or after != before or (outside / "executed").exists():
            accepted.append(name)
        shutil.rmtree(home / "forged")
    return {"forgeries": len(cases), "accepted": accepted}


def _examine(folder: Path) -> None:
    if not examine_checkpoint(folder, checks=[19]).ok:
        raise UserError("the doctor has a finding")


def _resume(folder: Path) -> None:
    found = look_in(folder)
    Run(found.settings, make_recipe(found.settings), found.run_dir, Stop()).restore(found)
