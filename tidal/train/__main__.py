"""`python -m tidal.train`: learn a recipe into a run folder."""

from __future__ import annotations

from pathlib import Path

from tidal.cli import UserError, main, note, parse
from tidal.config import Train
from tidal.train.presets import PRESETS

DESCRIPTION = """Train a Tidal model. The default recipe, addition, needs no data; for your own text:
python -m tidal.train --recipe text --data FILE"""


def run(argv: list[str]) -> None:
    """Parse the flags, check the data, train, draw the loss."""
    settings = parse(Train, argv, "tidal.train", DESCRIPTION, default=PRESETS[_recipe(argv)])
    _check(settings)
    from tidal import checkpoint  # torch comes with these
    from tidal.train.loop import make_recipe, train
    from tidal.train.plot import draw

    recipe = make_recipe(settings)
    out = checkpoint.prepare_run_dir(Path(settings.out or f"runs/{settings.recipe}"))
    train(settings, recipe, out)
    draw(out)
    example = '--prompt "54663 + 132 ="' if settings.recipe == "addition" else '--prompt "…"'
    note(f"done; try: python -m tidal.infer --checkpoint {out} {example}")


def _recipe(argv: list[str]) -> str:
    """The recipe asked for; its preset gives the other flags their defaults."""
    for flag, value in zip(argv, [*argv[1:], ""], strict=True):
        name, _, joined = flag.partition("=")
        if name == "--recipe" and (joined or value) in PRESETS:
            return joined or value
    return "text" if any(flag.partition("=")[0] == "--data" for flag in argv) else "addition"


def _check(settings: Train) -> None:
    """Raise UserError for numbers that make no sense; shapes are checked where they are made."""
    least = {"max_steps": 1, "rows": 1, "validate_every": 1, "keep": 1, "threads": 0, "max_seconds": 0, "seed": 0}
    for name, limit in least.items():
        if getattr(settings, name) < limit:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(settings, name)}; it must be at least {limit}")
    if settings.recipe == "addition" and settings.text.data:
        raise UserError("--data goes with --recipe text; the addition recipe makes its own data")


if __name__ == "__main__":
    main(run, "tidal.train")
