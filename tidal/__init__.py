"""Tidal: a language model that reads tokens and writes characters.

    model, tokenizer = tidal.load("runs/addition")
    tidal.generate(model, tokenizer, ["54663 + 132 ="])[0].completion
    for i, piece in tidal.stream(model, tokenizer, ["54663 + 132 ="]): ...    # blocks (str), at the end a Completion
    tidal.score(model, tokenizer, "54663 + 132 = 54795\\n", how="decode")
    tidal.doctor.run(model, tokenizer, quick=True).ok

What cannot be loaded raises tidal.UserError, arguments that make no sense ValueError, each in one line.
docs/decoding.md ("From Python") says more.

Names are imported on first use, so that the command lines answer before torch is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tidal.lazy import exports

if TYPE_CHECKING:
    from tidal import doctor as doctor
    from tidal.cli import UserError as UserError
    from tidal.config import Shape as Shape
    from tidal.config import TidalConfig as TidalConfig
    from tidal.infer.beam import beam_search as beam_search
    from tidal.infer.completion import Completion as Completion
    from tidal.infer.completion import Limits as Limits
    from tidal.infer.engine import Engine as Engine
    from tidal.infer.engine import generate as generate
    from tidal.infer.engine import stream as stream
    from tidal.infer.load import load as load
    from tidal.infer.sampling import Sampling as Sampling
    from tidal.infer.score import score as score
    from tidal.infer.trace import trace as trace
    from tidal.kernels import interval_attention as interval_attention
    from tidal.model import TidalTransformer as TidalTransformer
    from tidal.tokenizer import MixedTokenizer as MixedTokenizer

__version__ = "0.1.0"

__getattr__, __dir__ = exports(__name__, {
    "Completion": "tidal.infer.completion",
    "Engine": "tidal.infer.engine",
    "Limits": "tidal.infer.completion",
    "MixedTokenizer": "tidal.tokenizer",
    "Sampling": "tidal.infer.sampling",
    "Shape": "tidal.config",
    "TidalConfig": "tidal.config",
    "TidalTransformer": "tidal.model",
    "UserError": "tidal.cli",
    "beam_search": "tidal.infer.beam",
    "doctor": "tidal.doctor",
    "generate": "tidal.infer.engine",
    "interval_attention": "tidal.kernels",
    "load": "tidal.infer.load",
    "score": "tidal.infer.score",
    "stream": "tidal.infer.engine",
    "trace": "tidal.infer.trace",
})
