"""`python -m tidal.doctor`: examine a checkpoint."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tidal.cli import UserError, main, note, parse

if TYPE_CHECKING:
    import torch

    from tidal.config import Shape
    from tidal.doctor.patient import Document
    from tidal.doctor.report import Report

DESCRIPTION = """Check that training and decoding of a checkpoint agree, or name the first place where they do not.
Usage: python -m tidal.doctor [CHECKPOINT] [flags]; CHECKPOINT is a run folder (its best checkpoint) or a checkpoint
folder; without one, two small models are made and examined. Exit code 0: all well, 1: a finding, 2: could not run."""
MOST_TEXTS = 1000
"""Of --data; the checks look at fewer than a hundred."""


@dataclass(frozen=True)
class Doctor:
    """Settings of `python -m tidal.doctor`."""

    checkpoint: str | None = None
    """The same as CHECKPOINT."""
    data: tuple[str, ...] = ()
    """Your texts: files, folders, globs or .jsonl; none: what the run was trained on, and a built-in list."""
    quick: bool = False
    """Fewer and shorter texts."""
    checks: tuple[int, ...] = ()
    """Numbers of the checks to run; none: all."""
    json: bool = False
    """Print one JSON object."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes a GPU where there is one."""
    precision: Literal["float32", "bf16"] = "float32"
    """Of weights, cache and products, as tidal.infer is given it."""


def run(argv: list[str]) -> int:
    """Load or make a model, examine it, print the report."""
    folder, argv = _positional(argv)
    settings = parse(Doctor, argv, "tidal.doctor", DESCRIPTION)
    if None not in (folder, settings.checkpoint):
        raise UserError(f"both {folder!r} and --checkpoint {settings.checkpoint!r} are given; choose one")
    folder = settings.checkpoint if folder is None else folder
    from tidal import checkpoint  # torch comes with these
    from tidal.device import pick_device
    from tidal.doctor.examine import examine_checkpoint
    from tidal.doctor.registry import CHECKS
    from tidal.train.memory import memory_for

    if unknown := [n for n in settings.checks if n not in CHECKS]:
        raise UserError(f"--checks {unknown[0]}: there is no such check; they are numbered 1 to {max(CHECKS)}")
    device = pick_device(settings.device)
    with memory_for("the model's copies; try a machine with more"):
        texts = _texts(settings.data)
        if folder is None:
            report = _of_new_models(settings, texts, device)
        else:
            report = examine_checkpoint(checkpoint.resolve(folder), texts=texts, quick=settings.quick,
                                        checks=settings.checks or None, device=device, dtype=_dtype(settings),
                                        tell=note)  # fmt: skip
    print(json.dumps(report.to_dict(), ensure_ascii=False) if settings.json else report.table())
    return 0 if report.ok else 1


def _positional(argv: list[str]) -> tuple[str | None, list[str]]:
    """The argument that is no flag's value, in the first place or behind a flag that takes none; and the others."""
    for i, argument in enumerate(argv):
        if not argument.startswith("-") and (i == 0 or argv[i - 1] in ("--quick", "--json")):
            return argument, argv[:i] + argv[i + 1 :]
    return None, argv


def _dtype(settings: Doctor) -> torch.dtype | None:
    import torch

    return torch.bfloat16 if settings.precision == "bf16" else None


def _texts(data: tuple[str, ...]) -> list[Document]:
    from tidal.doctor.patient import Document
    from tidal.prepare.documents import read_documents

    first = itertools.islice(read_documents(data), MOST_TEXTS) if data else ()
    return [Document(d.prompt, d.completion) for d in first]


def _of_new_models(settings: Doctor, texts: list[Document], device: torch.device) -> Report:
    from tidal.device import set_threads
    from tidal.doctor.examine import run
    from tidal.doctor.registry import CHECKS
    from tidal.doctor.specimen import OF_SHAPE, OTHER, SHAPE, make

    set_threads(SHAPE.d_model)
    note("no checkpoint given: examining two small models with random weights")

    def examined(shape: Shape, checks: Sequence[int], quick: bool) -> Report:
        model, tokenizer = make(shape)
        return run(model.to(device, _dtype(settings)), tokenizer, texts=texts, quick=quick, checks=checks,
                   subject="two small models with random weights",
                   tell=lambda check: note(f"{check.number:>2} {check.title}"))  # fmt: skip

    wanted = settings.checks or tuple(CHECKS)
    report, again = examined(SHAPE, wanted, settings.quick), [n for n in wanted if n in OF_SHAPE]
    return report.merged(examined(OTHER, again, quick=True)) if again else report


if __name__ == "__main__":
    main(run, "tidal.doctor")
