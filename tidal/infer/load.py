"""Loading a model with its tokenizer from a run or a checkpoint."""

from __future__ import annotations

import os
from typing import Any

import torch

from tidal import checkpoint
from tidal.cli import UserError
from tidal.config import TidalConfig
from tidal.device import pick_device, shapes_only, usable
from tidal.model import TidalTransformer
from tidal.tokenizer import MixedTokenizer

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def load(path: str | os.PathLike[str] | None = None, *, device: str | torch.device = "cpu",
         dtype: torch.dtype | None = None) -> tuple[TidalTransformer, MixedTokenizer]:  # fmt: skip
    """Model (in evaluation mode) and tokenizer of a run folder (its best checkpoint) or of a checkpoint folder.

    `None` takes the newest run under `runs/`; the device "auto" is a GPU where there is one; `dtype` is of the weights
    (none: float32). Every file is verified against the manifest first. Raises UserError in one line for a device that
    cannot be used, a path that is neither, a damaged file, a config that does not fit the weights, a weight that is NaN
    or infinite, or a tokenizer that is not the checkpoint's own; ValueError for another dtype than DTYPES.
    """
    device = pick_device("auto") if device == "auto" else usable(device)
    model, tokenizer, _ = load_with_trainer(path, device=device, dtype=dtype)
    return model, tokenizer


def load_with_trainer(path: str | os.PathLike[str] | None = None, *, device: str | torch.device = "cpu",
                      dtype: torch.dtype | None = None) -> tuple[TidalTransformer, MixedTokenizer, dict[str, Any]]:
    """Like `load`, with the content of trainer.json: the step and the settings of the training."""
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype is {dtype!r}; it must be {', '.join(map(str, DTYPES[:-1]))} or {DTYPES[-1]}")
    folder = checkpoint.resolve(path)
    values, tensors, trainer = checkpoint.read_checkpoint(folder)
    try:
        config = TidalConfig.from_dict(values)
        tokenizer = MixedTokenizer.load(folder / "tokenizer")
        config.check_tokenizer(tokenizer.fingerprint)
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder} cannot be loaded: {error}") from error
    for name in ("vocab_size", "n_writable", "n_head", "max_block_units"):
        here, there = getattr(config, name), getattr(tokenizer, name)
        if here != there:
            raise UserError(f"{folder}: {name} is {here!r} in its config.json, but {there} in its tokenizer")
    try:
        if config.shape.reader_layers + config.shape.writer_layers > len(tensors):
            raise ValueError("it has more layers than there are tensors")
        width = tensors["unit_embedding.weight"].shape[-1] if "unit_embedding.weight" in tensors else 0
        if width != config.shape.d_model:
            raise ValueError(f"size mismatch: d_model is {config.shape.d_model}, its tensors are {width} wide")
        for name, tensor in tensors.items():
            if n := int((~tensor.isfinite()).sum()):
                raise UserError(f"{folder}: {name} has {n} values that are not finite; use another checkpoint")
        with shapes_only():  # sizes that the file does not have cost no memory
            TidalTransformer(config, tokenizer.spelling).load_state_dict(tensors, assign=True)
    except (RuntimeError, ValueError, OverflowError) as error:
        raise UserError(f"{folder}: weights do not fit its config.json: {error}") from error
    model = TidalTransformer(config, tokenizer.spelling)
    model.to(dtype=dtype or torch.float32).load_state_dict(tensors)  # in this order, so that none is rounded twice
    return model.to(device=device).eval(), tokenizer, trainer
