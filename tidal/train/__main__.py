"""`python -m tidal.train`: learn a recipe into a run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidal.allocator import keep_memory
from tidal.cli import UserError, flag_of, main, note, parse
from tidal.config import MOST_PLACES, Train, flat
from tidal.ranks import by_torchrun, one_voice, size
from tidal.train.presets import PRESETS, SIZES
from tidal.train.stop import Stop, Stopped

if TYPE_CHECKING:
    from tidal.train.loop import Recipe
    from tidal.train.parallel import Parallel
    from tidal.train.resume import Found

DESCRIPTION = """Train a Tidal model. The default recipe, addition, needs no data; for your own text:
python -m tidal.train --recipe text --data FILE. Defaults depend on the recipe: --recipe text --help shows those of
text."""

LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("max_steps", "rows", "parts", "validate_every", "keep", "accumulate", "problems"),
                    (1, math.inf)),
    **dict.fromkeys(("max_seconds", "warmup_steps", "samples"), (0, math.inf)),
    **dict.fromkeys(("lr", "table_lr_scale", "weight_decay", "sharpen", "aux_weight", "step_stride"), (0, 1e6)),
    **dict.fromkeys(("decay_fraction", "cut_probability", "elsewhere"), (0, 1)),
    "clip": (1e-6, 1e6),  # 0 would learn nothing
    "threads": (0, 1024), "seed": (0, 2**63 - 1), "workers": (-1, 64), "beta2": (0, 0.999999), "stretch": (1, 1e6),
    "digits": (1, 4000), "terms": (2, 99), "max_block_units": (4, MOST_PLACES // 2),
    "place_jitter": (0, MOST_PLACES // 2 - 2), "reader_budget": (16, math.inf),
    "vocab_size": (288, math.inf), "word_vocab_size": (288, math.inf),
}  # fmt: skip
"""Least and most of the numbers; shapes are checked where they are made."""


def run(argv: list[str]) -> int:
    """Parse the flags, check the data, train or continue, draw the loss.

    Returns 0, or after a signal what shells and schedulers expect of a process that it ended: 130 for SIGINT, 143 for
    SIGTERM. The run is then saved, and the same command continues it.
    """
    keep_memory()
    with one_voice():
        return _run(argv)


def _run(argv: list[str]) -> int:
    found = None
    if (path := _named(argv, "--resume")) is not None:
        from tidal.train.resume import look_in

        found = look_in(path)  # its settings are the defaults
        default = dataclasses.replace(found.settings, out=str(found.run_dir), resume=str(path))
    elif (path := _named(argv, "--init-from")) is not None:
        from tidal.train.fine_tuning import defaults_from

        default = defaults_from(path)
    else:
        default = PRESETS[_recipe(argv)]
    if (name := _given(argv, "--model-size")) not in (None, default.model_size):
        if path is not None:
            raise UserError(f"--model-size {name}: the model of {path} has its size; leave --model-size out")
        if name not in SIZES or default.recipe != "text":
            raise UserError(f"--model-size {name}: give one of {', '.join(SIZES)}, with --recipe text")
        default = SIZES[name]
    settings = parse(Train, argv, "tidal.train", DESCRIPTION, default=default)
    if settings.init_from is not None:
        if not settings.init_from:
            raise UserError("--init-from is empty; give a run folder or a checkpoint in one")
        settings = dataclasses.replace(settings, init_from=str(Path(settings.init_from)))  # runs/text/ is runs/text
    if found is not None:
        settings = _data_or_prepared(settings, argv)
    _check(settings, default)
    if found is None and settings.resume not in ("auto", "never"):
        raise UserError(f"--resume is {settings.resume!r}; give auto, never, a run folder or a checkpoint in one")
    if settings.out == "":
        raise UserError("--out is empty; give a folder for the run")
    if found is not None and os.path.realpath(str(settings.out)) != os.path.realpath(str(default.out)):
        raise UserError(f"--out is {settings.out}, but --resume continues in {default.out}; leave one of them out")
    wanted = Path(settings.out or f"runs/{settings.recipe}")
    if same := [path for path in (*settings.text.data, *settings.text.validation_data)
                if os.path.realpath(path) == os.path.realpath(wanted)]:  # fmt: skip
        raise UserError(f"--out {wanted} is the folder of the data {same[0]}; give the run a folder of its own")
    with Stop() as stop:
        try:
            _train(settings, wanted, found, stop)
        except Stopped as stopped:
            note(f"tidal.train: {'interrupted' if stopped.signal == signal.SIGINT else 'terminated'}")
            return 128 + stopped.signal
    return 0


def _train(settings: Train, wanted: Path, found: Found | None, stop: Stop) -> None:
    """Continue `found`, or what there is to continue in `wanted`, or begin a new run."""
    from tidal.device import pick_device  # torch comes with these
    from tidal.train.disk import check_writable
    from tidal.train.parallel import joined
    from tidal.train.resume import is_finished, may_continue, to_continue

    device = pick_device(settings.device)  # what can fail fails before there is a run folder
    check_writable(wanted)
    if found is not None:
        may_continue(found, settings, path_given=True)
    elif settings.resume == "auto":
        found = to_continue(settings, wanted)
    if found is not None and is_finished(found, settings):
        what = found.run_dir if found.folder == found.newest else found.folder  # of a run that has gone on
        note(f"{what} is finished: {found.saved.step} steps in {found.saved.seconds:.0f} s; --resume never trains "
             f"another one; try: {_use(settings, what)}")  # fmt: skip
        return
    with joined(settings.parallel, device) as parallel, contextlib.ExitStack() as held:
        recipe, out, source = _ready(settings, wanted, found, stop, parallel, held)
        _learn(settings, recipe, out, found, source, stop, parallel)
    note(f"done; try: {_use(settings, out)}")


def _learn(settings: Train, recipe: Recipe, out: Path, found: Found | None, source: Path | None, stop: Stop,
           parallel: Parallel) -> None:  # fmt: skip
    """Train in the folder `out`, which is held, and draw what came of it."""
    from tidal import checkpoint
    from tidal.report.page import Pages, draw  # downstream of the loop, as the doctor is
    from tidal.train.disk import retry_while_full
    from tidal.train.loop import train

    pages = Pages()
    try:
        train(settings, recipe, out, stop=stop, found=found, source=source, parallel=parallel,
              after_validation=lambda out: retry_while_full(lambda: pages.write(out), out, stop))  # fmt: skip
    except Stopped:
        latest = checkpoint.read_pointer(out, "latest")
        how = "the same command" if settings.resume == "auto" else f"--resume {out}"
        note("nothing was saved" if latest is None else f"saved {latest}; {how} continues it")
        raise
    if parallel.leads:
        retry_while_full(lambda: draw(out), out, stop)
        retry_while_full(lambda: pages.write(out, last=True), out, stop)


def _use(settings: Train, folder: Path) -> str:
    """A command that shows what a run or checkpoint has learnt."""
    prompt = {"addition": "54663 + 132 =", "characters": "swap t r in later ="}.get(settings.recipe, "…")
    return f'python -m tidal.infer --checkpoint {folder} --prompt "{prompt}"'


def _ready(settings: Train, wanted: Path, found: Found | None, stop: Stop, parallel: Parallel,
           held: contextlib.ExitStack) -> tuple[Recipe, Path, Path | None]:  # fmt: skip
    """The data, the tokenizer, the run's folder, and the checkpoint that --init-from names. The first process makes or
    finds them; the others wait.

    Nobody else may write to the folder as long as `held` is open. It is not locked while data are prepared.
    """
    from tidal.checkpoint import resolve
    from tidal.files import atomic_write
    from tidal.train.disk import locked, prepare_run_dir, retry_while_full
    from tidal.train.fine_tuning import maybe_learnt
    from tidal.train.loop import make_recipe, model_for
    from tidal.train.memory import memory_for
    from tidal.train.records import write_settings
    from tidal.train.resume import check_unchanged, with_tokenizer

    source = None
    with stop.anywhere():
        if parallel.leads:
            if settings.init_from and found is None:  # once: a run that is being trained may choose another soon
                source = resolve(Path(settings.init_from))
            recipe = make_recipe(with_tokenizer(settings, found.folder if found else source))
            if source is not None and (learnt := maybe_learnt(settings, recipe.digest, source)):
                note(f"what is held out here may have been learnt by {source}, which was trained on {learnt[0]}, too; "
                     "figures on it are no held-out figures (docs/training.md, Fine-tuning)")  # fmt: skip
            verdict = None
            if settings.doctor and found is None:
                from tidal.doctor.examine import examine_before_training  # downstream of the loop

                verdict = examine_before_training(settings, recipe, source).to_dict()
            elif source is not None:
                with memory_for("the weights; try a smaller model"):  # what does not fit fails before there is a folder
                    model_for(settings, recipe.tokenizer, source)
            out = prepare_run_dir(wanted) if found is None else found.run_dir
            held.enter_context(locked(out))
            check_unchanged(out, found)
            if found is None:  # the first file: by it, reading --data knows a run, and leaves it out
                retry_while_full(lambda: write_settings(out, settings), out, stop)
                (out / "doctor.json").unlink(missing_ok=True)  # of a run that ended here before its first checkpoint
            if verdict is not None:
                text = json.dumps(verdict, indent=1, ensure_ascii=False) + "\n"
                retry_while_full(lambda: atomic_write(out / "doctor.json", text), out, stop)
            if parallel.size > 1 and found is None:
                retry_while_full(lambda: recipe.tokenizer.save(out / "tokenizer"), out, stop)
            parallel.broadcast(json.dumps([str(out), source and str(source)]))
        else:
            there, begins = json.loads(parallel.broadcast(""))
            out, source = Path(there), begins and Path(begins)
            recipe = make_recipe(with_tokenizer(settings, out if found is None else found.folder))
        parallel.check_same(f"{recipe.digest} {recipe.tokenizer.fingerprint} {found and found.folder}")
    return recipe, out, source


def _data_or_prepared(settings: Train, argv: list[str]) -> Train:
    """Settings of a run that goes on with its data in another form: of --data and --prepared the one that is given."""
    data, prepared = (_given(argv, flag) is not None for flag in ("--data", "--prepared"))
    if data == prepared:
        return settings
    other: dict[str, Any] = {"prepared": None} if data else {"data": ()}
    return dataclasses.replace(settings, text=dataclasses.replace(settings.text, **other))


def _named(argv: list[str], flag: str) -> Path | None:
    """The run or checkpoint that --resume or --init-from names."""
    given = _given(argv, flag)
    named = given not in (None, "auto", "never", "") and not {"-h", "--help"} & set(argv)
    return Path(str(given)) if named else None


def _recipe(argv: list[str]) -> str:
    """The recipe asked for; its preset gives the other flags their defaults."""
    if (given := _given(argv, "--recipe")) in PRESETS:
        return str(given)
    return "text" if any(flag.partition("=")[0] in ("--data", "--prepared") for flag in argv) else "addition"


def _given(argv: list[str], flag: str) -> str | None:
    """The value of a flag that must be known before the others can be read, if it is given."""
    found = None
    for argument, value in itertools.pairwise([*argv, ""]):
        name, equals, joined = argument.partition("=")
        if name.replace("_", "-") == flag:
            found = joined if equals else value
    return found


def _check(settings: Train, default: Train) -> None:
    """Raise UserError for settings that make no sense, and for those that would do nothing."""
    for part in (settings, settings.model, settings.optim, settings.addition, settings.characters, settings.text):
        for name, (least, most) in LIMITS.items():
            value = vars(part).get(name, least)
            if not least <= value <= most:  # nan neither
                wanted = f"at least {least}" if most == math.inf else f"between {least} and {most}"
                raise UserError(f"{flag_of(name)} is {value}; it must be {wanted}")
    if settings.init_from and settings.recipe != default.recipe:
        raise UserError(f"--recipe {settings.recipe}: {settings.init_from} was trained by the recipe {default.recipe}")
    if settings.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError('--tensorboard needs the package tensorboard: pip install -e ".[tensorboard]"')
    if settings.rows % size():
        raise UserError(f"--rows is {settings.rows}; it must be a multiple of {size()}, the number of processes")
    # validation asks two digits more; before their sum is a space, and it has one digit more, of 11 terms or more two
    longest = settings.addition.digits + 3 + len(str(settings.addition.terms - 1))
    if settings.recipe == "addition" and longest > settings.addition.max_block_units:
        raise UserError(f"--digits is {settings.addition.digits}; such sums need --max-block-units {longest} or more")
    if settings.recipe != "text" and (settings.text.data or settings.text.prepared):
        raise UserError(f"--data goes with --recipe text; the {settings.recipe} recipe makes its own data")
    for recipe in {"addition", "characters", "text"} - {settings.recipe}:
        own, old = vars(getattr(settings, recipe)), vars(getattr(default, recipe))
        if given := [name for name in own if own[name] != old[name]]:
            raise UserError(f"{flag_of(given[0])} goes with --recipe {recipe}, not {settings.recipe}")
    text, old_text = vars(settings.text), vars(default.text)
    settled = [name for name in ("vocab_size", "validation_data", "hold_out") if text[name] != old_text[name]]
    if settings.text.prepared and settled:
        raise UserError(f"{flag_of(settled[0])} was settled when {settings.text.prepared} was prepared")
    before, now = (flat(dataclasses.asdict(each)) for each in (default, settings))
    shape, single = settings.model, settings.parallel == "fsdp" and not by_torchrun()
    for names, where in (
        (("vocab_size",), text["tokenizer"] and f"--tokenizer {text['tokenizer']}, which is trained already"),
        (("vocab_size", "word_vocab_size", "max_block_units"),
         settings.init_from and "--init-from, which has its tokenizer"),
        (("query_gain",), settings.init_from and "--init-from, which has its gains"),
        (("hold_out",), text["validation_data"] and "--validation-data"),
        (("cache",), text["prepared"] and f"--prepared {text['prepared']}"),
        (("step_stride", "step_window"), shape.writer_attention == "none" and "--writer-attention none; give another"),
        (("query_gain", "sharpen"), not shape.qk_norm and "--no-qk-norm; leave one of them out"),
        (("parallel",), single and "a single process; start several with torchrun"),
    ):
        if where and (idle := [name for name in names if now[name] != before[name]]):
            raise UserError(f"{flag_of(idle[0])} does nothing with {where}")
    if settings.model.foretell and not settings.optim.aux_weight:
        raise UserError("--aux-weight is 0, but what --foretell tells is learnt with it; give --no-foretell, too")


if __name__ == "__main__":
    main(run, "tidal.train")
