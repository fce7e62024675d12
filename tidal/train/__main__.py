"""`python -m tidal.train`: learn a recipe into a run folder."""

from __future__ import annotations

import math
from pathlib import Path

from tidal.cli import UserError, main, note, parse
from tidal.config import Train
from tidal.train.presets import PRESETS

DESCRIPTION = """Train a Tidal model. The default recipe, addition, needs no data; for your own text:
python -m tidal.train --recipe text --data FILE"""

LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("max_steps", "rows", "validate_every", "keep", "accumulate", "digits"), (1, math.inf)),
    **dict.fromkeys(("threads", "max_seconds", "seed", "warmup_steps"), (0, math.inf)),
    **dict.fromkeys(("lr", "table_lr_scale", "weight_decay", "clip", "aux_weight", "step_stride"), (0, 1e6)),
    **dict.fromkeys(("decay_fraction", "cut_probability"), (0, 1)),
    "beta2": (0, 0.999999), "max_block_units": (4, math.inf), "reader_budget": (16, math.inf),
    "vocab_size": (288, math.inf),
}  # fmt: skip
"""Least and most of the numbers; shapes are checked where they are made."""


def run(argv: list[str]) -> None:
    """Parse the flags, check the data, train, draw the loss."""
    settings = parse(Train, argv, "tidal.train", DESCRIPTION, default=PRESETS[_recipe(argv)])
    _check(settings)
    from tidal import checkpoint  # torch comes with these
    from tidal.device import pick_device
    from tidal.train.loop import make_recipe, train
    from tidal.train.plot import draw

    pick_device(settings.device)  # what can fail fails before there is a run folder
    wanted = Path(settings.out or f"runs/{settings.recipe}")
    checkpoint.check_writable(wanted)
    recipe = make_recipe(settings)
    out = checkpoint.prepare_run_dir(wanted)
    train(settings, recipe, out)
    draw(out)
    example = '--prompt "54663 + 132 ="' if settings.recipe == "addition" else '--prompt "…"'
    note(f"done; try: python -m tidal.infer --checkpoint {out} {example}")


def _recipe(argv: list[str]) -> str:
    """The recipe asked for; its preset gives the other flags their defaults."""
    for flag, value in zip(argv, [*argv, ""][1:], strict=True):
        name, _, joined = flag.partition("=")
        if name == "--recipe" and (joined or value) in PRESETS:
            return joined or value
    return "text" if any(flag.partition("=")[0] == "--data" for flag in argv) else "addition"


def _check(settings: Train) -> None:
    """Raise UserError for settings that make no sense."""
    for part in (settings, settings.model, settings.optim, settings.addition, settings.text):
        for name, (least, most) in LIMITS.items():
            value = vars(part).get(name, least)
            if not least <= value <= most:  # nan neither
                wanted = f"at least {least}" if most == math.inf else f"between {least} and {most}"
                raise UserError(f"--{name.replace('_', '-')} is {value}; it must be {wanted}")
    longest = settings.addition.digits + 4  # validation asks two digits more; their sum has one more, and its space
    if settings.recipe == "addition" and longest > settings.addition.max_block_units:
        raise UserError(f"--digits is {settings.addition.digits}; such sums need --max-block-units {longest} or more")
    if settings.recipe == "addition" and settings.text.data:
        raise UserError("--data goes with --recipe text; the addition recipe makes its own data")


if __name__ == "__main__":
    main(run, "tidal.train")
