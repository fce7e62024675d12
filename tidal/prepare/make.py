"""From `--data` to prepared documents: in memory, or shards on the disk that several processes make."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

from tidal.blocks import BlockTable
from tidal.cli import UserError, note, progress
from tidal.config import Text
from tidal.files import atomic_write, existing, free_bytes, locked
from tidal.prepare.corpus import Corpus
from tidal.prepare.reading import PART, Part
from tidal.prepare.seams import at_seams
from tidal.prepare.shards import BYTES_PER_BYTE, SHARD, Shard, verify
from tidal.prepare.survey import Survey, survey
from tidal.ranks import n_cores
from tidal.tokenizer import MixedTokenizer

VERSION = 1
"""Of the layout of the folder; raise it whenever the same data would give other shards."""
IN_MEMORY = 64_000_000
"""Bytes of text up to which training prepares in memory; more goes into the cache on the disk."""
MOST_WORKERS = 16
"""Unless more are asked for: each takes memory."""
PER_PART = 64
"""What a part counts besides its characters, so that a shard does not hold millions of empty ones."""
PLAN, MANIFEST, HELD_OUT = "plan.json", "manifest.json", "held-out"
_LEFTOVER = re.compile(r"((shard|held-out)-\d{6}|\.?(plan|manifest)\.json|\.?tokenizer\.(model|json))\.\d+\.tmp")
"""What a process that was killed may leave half-written. No other name is ours to remove."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Data ready for training."""

    tokenizer: MixedTokenizer
    training: Corpus
    held_out: Corpus
    digest: str
    """Of the data and of what is held out, see `Survey`."""


def prepare_for_training(text: Text, seed: int) -> Prepared:
    """What the settings of a run ask for: shards that are there, or else made in memory or in the cache.

    Raises UserError for data, tokenizers and folders that cannot be used.
    """
    if text.prepared is not None:
        if text.data:
            raise UserError("--prepared brings its own data; leave --data out")
        found = load(Path(text.prepared))
        if text.tokenizer and tokenizer_for(text.tokenizer, 0, ()).fingerprint != found.tokenizer.fingerprint:
            raise UserError(f"{text.prepared} was prepared with another tokenizer than {text.tokenizer}; prepare anew")
        return found
    data = survey(text.data, text.hold_out, seed, text.validation_data)
    tokenizer = tokenizer_for(text.tokenizer, text.vocab_size, data.training_texts())
    if data.n_bytes > IN_MEMORY:
        out = Path(text.cache).expanduser() / f"{data.digest[:16]}-{tokenizer.fingerprint[:16]}"
        size = data.n_bytes / 1e6
        note(f"{size:,.0f} MB of text; its shards, up to {BYTES_PER_BYTE * size:,.0f} MB, are kept in {out}")
        return prepare(data, tokenizer, out)
    parts: dict[bool, list[Shard]] = {False: [], True: []}
    table = BlockTable(tokenizer)
    with progress(data.n_bytes, "prepare", "bytes") as bar:
        for held_out, _, group in _groups(data, tokenizer.max_block_units):
            parts[held_out].append(Shard.encode(group, table))
            bar.update(len(parts[held_out][-1].text))
    return Prepared(tokenizer, Corpus(parts[False]), Corpus(parts[True]), data.digest)


def tokenizer_for(folder: str | None, vocab_size: int, texts: Iterable[str]) -> MixedTokenizer:
    """The tokenizer of a folder, or else one trained on texts. Raises UserError where that cannot be."""
    try:
        if folder is not None:
            return MixedTokenizer.load(folder)
        note("training the tokenizer")
        return MixedTokenizer.train(texts, vocab_size)
    except ValueError as error:
        raise UserError(str(error)) from error


def _groups(data: Survey, cap: int) -> Iterator[tuple[bool, int, list[Part]]]:
    """The parts of each shard, with its number and whether it is held out; those held out come last.

    Where shards begin depends on the data and on `cap` (`max_block_units`) alone.
    """
    kept: list[Part] = []

    def training() -> Iterator[Part]:
        for held_out, part in data.parts():
            if held_out:
                kept.append(part)  # at most about two million characters, or all of --validation-data
            else:
                yield part

    for held_out, parts in ((False, training()), (True, iter(kept))):
        group: list[Part] = []
        number = weight = 0
        for part in at_seams(parts, cap, PART):
            group.append(part)
            weight += len(part.text) + PER_PART
            if weight >= SHARD:
                yield held_out, number, group
                number, weight, group = number + 1, 0, []
        if group:
            yield held_out, number, group


def prepare(data: Survey, tokenizer: MixedTokenizer, out: Path, workers: int = 0) -> Prepared:
    """Write shards into the folder `out`, or those that are missing there; `workers` 0 means all cores, at most
    MOST_WORKERS.

    Raises:
        UserError: the folder holds something else, cannot be written or is full, or a worker was killed. What is
            finished stays, and the same call goes on from there.
    """
    plan = {"version": VERSION, "data": data.digest, "tokenizer": tokenizer.fingerprint, "shard": SHARD}
    try:
        check_folder(out)
        if not (out / PLAN).exists():
            _check_space(out, data)
            out.mkdir(parents=True, exist_ok=True)
        with _alone(out):
            _begin_folder(out, plan, data)
            finished = (out / MANIFEST).exists()
        if finished:  # processes that train together compare the shards at the same time
            with contextlib.suppress(UserError):
                return load(out)
        with _alone(out):
            if (out / MANIFEST).exists():
                try:
                    return load(out)
                except UserError as error:
                    note(f"mending {out}: {error}")
                    (out / MANIFEST).unlink()
            for path in (*out.iterdir(), *(out / "tokenizer").glob("*")):
                if _LEFTOVER.fullmatch(path.name):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            tokenizer.save(out / "tokenizer")
            names = _write_shards(data, tokenizer, out, workers)
            text = json.dumps({**names, "digest": _digest(names)}, indent=2)
            atomic_write(out / MANIFEST, text + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}; what is finished stays there, and the same "
                        "command goes on from it") from error  # fmt: skip
    except BrokenProcessPool as error:
        raise UserError("a worker was killed, perhaps for want of memory; the same command goes on where it stopped, "
                        "try it with fewer --workers") from error  # fmt: skip
    return load(out)


def _alone(out: Path) -> contextlib.AbstractContextManager[None]:
    """Hold the folder, or wait for it."""
    return locked(out, lambda: note(f"another process is preparing {out}; waiting for it"))


def _begin_folder(out: Path, plan: dict[str, Any], data: Survey) -> None:
    """Write plan.json into an empty folder, or see that it is the same. Raises UserError, OSError."""
    if (out / PLAN).exists():
        found = _json(out / PLAN)
        if changed := [name for name in plan if found.get(name) != plan[name]]:
            raise UserError(f"{out} was prepared from another {' and '.join(changed)} (or with another --seed, "
                            "--hold-out or --validation-data); choose another --out, or remove it")  # fmt: skip
        return
    check_folder(out)
    read = {"paths": list(data.paths), "validation": list(data.validation), "bytes": data.n_bytes}
    atomic_write(out / PLAN, json.dumps({**plan, **read}, indent=2) + "\n")


def check_folder(out: Path) -> None:
    """Raise UserError where the folder `out` cannot be, or holds something else than prepared data."""
    try:
        usable = (there := existing(out)).is_dir() and (not out.exists() or (out / PLAN).exists() or
                                                        all(_LEFTOVER.fullmatch(path.name) for path in out.iterdir()))
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; choose another --out") from error
    if not usable:
        raise UserError(f"{there} is there already and holds something else; choose another --out")


def _check_space(out: Path, data: Survey) -> None:
    """Raise UserError where the folder `out` has not the space it will need."""
    free, need = free_bytes(out), BYTES_PER_BYTE * data.n_bytes
    if free < need:
        raise UserError(f"not enough space in {out}: up to {need / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are "
                        "free; free space, or choose another folder")  # fmt: skip


def _write_shards(data: Survey, tokenizer: MixedTokenizer, out: Path, workers: int) -> dict[str, str]:
    """Write what is missing; the digests of all shards, by name. Raises UserError, OSError, BrokenProcessPool."""
    digests: dict[str, str] = {}
    workers = workers or min(n_cores(), MOST_WORKERS)
    waiting: dict[Future[str], str] = {}

    def collect(limit: int) -> None:
        while len(waiting) > limit:
            for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                digests[waiting.pop(done)] = done.result()

    with progress(data.n_bytes, "prepare", "bytes") as bar, _pool(workers, tokenizer) as pool:
        for held_out, number, group in _groups(data, tokenizer.max_block_units):
            name = f"{HELD_OUT}-{number:06d}" if held_out else f"shard-{number:06d}"
            if (digest := _intact(out / name, group)) is not None:
                digests[name] = digest
            elif pool is None:
                digests[name] = _write_one(group, out / name)
            else:
                waiting[_submit(pool, group, out / name)] = name
            bar.update(sum(len(part.text.encode()) for part in group))
            collect(2 * workers)
        collect(0)
    return dict(sorted(digests.items()))


def _intact(folder: Path, group: list[Part]) -> str | None:
    """The digest of a shard that is there; None where there is none, or one that is damaged or of other text, since the
    data changed and changed back: that is removed."""
    if not folder.exists():
        return None
    try:
        digest = verify(folder)
        if not Shard.open(folder).holds(group):
            raise UserError(f"{folder} was made of other text")
        return digest
    except UserError as error:
        note(f"making {folder.name} again: {str(error).partition('; ')[0]}")
        shutil.rmtree(folder)
        return None


@contextlib.contextmanager
def _pool(workers: int, tokenizer: MixedTokenizer) -> Iterator[ProcessPoolExecutor | None]:
    """Processes to call `_write_one` in; None for one, which is this one. What has not begun is given up at an error.

    They are spawned: a fork of a process that runs torch's threads may hang.
    """
    if workers == 1:
        _begin_work(tokenizer)
        yield None
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin_worker, (tokenizer,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, group: list[Part], folder: Path) -> Future[str]:
    """Workers that are started for it inherit that SIGINT is blocked: Ctrl-C goes to all, and the parent ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_write_one, group, folder)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_tables: list[BlockTable] = []
"""The one of this process."""


def _begin_work(tokenizer: MixedTokenizer) -> None:
    _tables[:] = [BlockTable(tokenizer)]


def _begin_worker(tokenizer: MixedTokenizer) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _begin_work(tokenizer)


def _end_with_parent() -> None:
    """A pool whose owner is killed would wait for work forever."""
    if (parent := parent_process()) is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _write_one(group: list[Part], folder: Path) -> str:
    return Shard.encode(group, _tables[0]).write(folder)


def load(folder: Path) -> Prepared:
    """Open prepared data, after comparing all shards with their SHA-256. Raises UserError: unfinished, damaged."""
    if not os.path.exists(folder / PLAN):  # Path.exists raises where it may not look
        raise UserError(f"{folder} holds no prepared data; python -m tidal.prepare --data … --out {folder} makes it")
    plan = _json(folder / PLAN)
    if plan.get("version") != VERSION:
        raise UserError(f"{folder} has layout {plan.get('version')!r:.20}, not {VERSION}; prepare the data again")
    if not (folder / MANIFEST).exists():
        raise UserError(f"{folder} is not finished; run the same python -m tidal.prepare again, it goes on")
    digests = _json(folder / MANIFEST)
    if digests.pop("digest", None) != _digest(digests):
        raise UserError(f"{folder / MANIFEST} is damaged, or of an older version; run the same python -m tidal.prepare "
                        "again, it keeps the shards")  # fmt: skip
    for name, digest in digests.items():
        verify(folder / name, digest)
    try:
        tokenizer = MixedTokenizer.load(folder / "tokenizer")
    except ValueError as error:
        raise UserError(f"{folder}: {error}; prepare again") from error
    if tokenizer.fingerprint != plan.get("tokenizer"):
        raise UserError(f"{folder / 'tokenizer'} is not the one the shards were made with; prepare again")
    training, held_out = ([folder / name for name in sorted(digests) if name.startswith(HELD_OUT) == side]
                          for side in (False, True))  # fmt: skip
    return Prepared(tokenizer, Corpus(training), Corpus(held_out), str(plan.get("data")))


def _digest(names: dict[str, str]) -> str:
    """Of the other lines of a manifest, so that damage to it shows as well."""
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}; remove {path.parent} and prepare again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it is no object; remove {path.parent} and prepare again")
    return values
