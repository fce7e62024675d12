"""Settings, as dataclasses; the strings under the fields are the help texts of the command line.

No torch here: `--help` must answer at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self, TypeVar


class Steps(NamedTuple):
    """What the stream builder must know of a model."""

    stride: float = 0.0
    """Reader positions between two of them."""
    window: int = 0
    """How many of them a step sees, itself and those just before it; 0: all up to itself."""
    recall: bool = False
    """Whether a step is told what followed the same units the last time."""


PLAIN_STEPS = Steps()


@dataclass(frozen=True)
class Shape:
    """The shape of a model, as far as a person chooses it."""

    d_model: int = 128
    """Width of the reader's and the writer's states."""
    n_heads: int = 4
    """Attention heads; must divide the width."""
    n_kv_heads: int = 4
    """Key and value heads, shared by groups of heads; must divide the heads."""
    reader_layers: int = 3
    """Layers that read tokens; 0: the writer attends to tokens and places as they are."""
    writer_layers: int = 1
    """Layers that write characters."""
    reader_ff: int = 384
    """Hidden width of the reader's SwiGLU."""
    writer_ff: int = 384
    """Hidden width of the writer's SwiGLU."""
    foretell: bool = False
    """Tell the writer, unit by unit, what the reader expects the next block's last token to be."""
    recall: bool = False
    """An n-gram cache: what came next after this ending in the document, also after the same one and two blocks."""
    suffix_rows: int = 16384
    """Rows of the hashed table of written suffixes; 0 turns it off."""
    writer_attention: Literal["memory", "block", "none"] = "memory"
    """What the first writer layer sees: the text so far and its own block, its own block only, or nothing."""
    qk_norm: bool = True
    """Normalize queries and keys."""
    query_gain: float = 1.0
    """Initial gain of the query norm; a larger one begins with sharper attention."""
    rotary_places: bool = False
    """Places turn queries and keys (RoPE, half of each head): only their differences matter. Else they are added."""
    place_jitter: int = 0
    """In training, every document's places are moved by a random number up to this one."""
    step_stride: float = 0.0
    """ALiBi distance between two characters of the block being written (writer steps, not training steps)."""
    step_window: int = 0
    """How many of its own block's last characters a writer step attends to, itself included; 0: all."""

    def __post_init__(self) -> None:
        for name, least in (("d_model", 1), ("n_heads", 1), ("n_kv_heads", 1), ("reader_layers", 0),
                            ("writer_layers", 1), ("reader_ff", 1), ("writer_ff", 1),
                            ("suffix_rows", 0), ("query_gain", 0), ("place_jitter", 0),
                            ("step_stride", 0), ("step_window", 0)):  # fmt: skip
            value = getattr(self, name)
            if not hasattr(value, "__float__") or not least <= value < 2**31:  # NaN too
                raise ValueError(f"{name} is {value!r}; it must be at least {least}, and less than 2^31")
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.rotary_places and self.d_model // self.n_heads % 4:
            raise ValueError(f"heads are {self.d_model // self.n_heads} wide; rotary_places needs a multiple of 4")
        if self.writer_attention not in ("memory", "block", "none"):
            raise ValueError(f"writer_attention is {self.writer_attention!r}; choose memory, block or none")

    @property
    def steps(self) -> Steps:
        """What the builder must know."""
        return Steps(self.step_stride, self.step_window, self.recall)


LAYOUT = 3
"""Raise it whenever the builder or the model feeds other ids, positions, places, hashes or encodings for the same
text: old weights would load, and write garbage."""

MOST_PLACES = 1 << 17
"""Their encodings are computed when a model is built, and a config from elsewhere must not ask for any amount."""


@dataclass(frozen=True)
class TidalConfig:
    """All that is needed to build a `TidalTransformer`: a shape, and the tokenizer's side of it."""

    vocab_size: int
    """All ids the reader knows."""
    n_writable: int
    """Ids below this one can be written."""
    n_head: int
    """Columns of the head: `n_writable` and room for `<bob>`, padded to a multiple of 64."""
    max_block_units: int
    """The longest block, in units."""
    fingerprint: str
    """Of the tokenizer this model belongs to."""
    shape: Shape = field(default_factory=Shape)
    layout: int = LAYOUT
    """Of the streams that the weights were trained on."""

    def __post_init__(self) -> None:
        if self.layout != LAYOUT:
            raise ValueError(
                f"the model was trained on streams of layout {self.layout}, this version of Tidal builds layout "
                f"{LAYOUT}; use the version that trained it, or train again"
            )
        if self.n_places > MOST_PLACES:  # their encodings are computed, not loaded
            raise ValueError(f"max_block_units and place_jitter make {self.n_places} places, more than {MOST_PLACES}")

    @property
    def n_places(self) -> int:
        """Places there are: every step of the longest block (its `<eob>` too), moved by the jitter."""
        return self.max_block_units + 1 + self.shape.place_jitter

    def check_tokenizer(self, fingerprint: str) -> None:
        """Raise ValueError unless this is the fingerprint of the model's own tokenizer (law 7)."""
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"the model was trained with tokenizer {self.fingerprint[:16]}…, this one is {fingerprint[:16]}…"
            )

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises ValueError on unknown or missing keys and values of another type (law 7)."""
        return _from_json(cls(0, 0, 0, 0, ""), values, complete=True)


@dataclass(frozen=True)
class Optim:
    """How the weights are learnt: Muon for matrices, AdamW for the rest."""

    lr: float = 2e-3
    """Highest learning rate of the matrices, which Muon trains (embeddings and gains: AdamW)."""
    table_lr_scale: float = 10.0
    """Embedding tables learn with this multiple of --lr, and without weight decay."""
    weight_decay: float = 0.1
    """Weight decay of the matrices."""
    sharpen: float = 0.0
    """Growth of the query gains while the learning rate falls: sharp attention holds on longer texts; 0: off."""
    beta2: float = 0.98
    """Second moment rate of AdamW, which learns the tables."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    decay_fraction: float = 0.5
    """Fraction of the steps, at the end, in which the learning rate falls linearly to zero."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    aux_weight: float = 0.3
    """Weight of the auxiliary loss: of the next block's last token, asked of the reader."""
    accumulate: int = 1
    """Gradient accumulation: batches per optimizer step, with the gradient of one batch of so many times the rows."""


Lengths = Literal["uniform", "rising", "equal", "numbers"]


@dataclass(frozen=True)
class Addition:
    """The data of `--recipe addition`."""

    digits: int = 5
    """Most digits of an operand in training; one run sees all lengths up to it."""
    lengths: Lengths = "uniform"
    """`uniform`: each length alike; `rising`: more long ones; `equal`: one a problem; `numbers`: as random numbers."""
    samples: int = 0
    """Size of a finite training set of different problems, drawn once; 0: new problems all the time."""
    operations: str = "+"
    """Of these, each as often: + - * (of a product the second number has one digit)."""
    terms: int = 2
    """Most numbers of a sum; it has two at least."""
    problems: int = 1
    """Most problems of a document, of which the last is learnt and the others are its context."""
    elsewhere: float = 0.0
    """Fraction of the documents that begin with a distractor: another solved problem, at places of its own."""
    stretch: float = 1.0
    """In training, distances in each document are multiplied by a random number from 1 to this one."""
    max_block_units: int = 128
    """Longest number that can be written, in characters."""


@dataclass(frozen=True)
class Characters:
    """The data of `--recipe characters`."""

    word_vocab_size: int = 512
    """Size of the vocabulary that words are read in, of which about 360 are not longer than a letter."""


@dataclass(frozen=True)
class Data:
    """Texts, how they are tokenized, and what is kept for validation."""

    data: tuple[str, ...] = ()
    """Text files, folders, globs, .jsonl and .parquet ({"text"} or {"prompt", "completion"}), .gz; hf:DATASET."""
    tokenizer: str | None = None
    """Folder of a trained tokenizer; none: train one on the data."""
    vocab_size: int = 2048
    """Size of the sentencepiece vocabulary to train."""
    validation_data: tuple[str, ...] = ()
    """Like --data, for validation; none: a part of --data."""
    hold_out: float = 0.05
    """Fraction of the characters (at most about a million) held out for validation: whole documents, or one's end."""


@dataclass(frozen=True)
class Text(Data):
    """The data of `--recipe text`."""

    prepared: str | None = None
    """Folder that python -m tidal.prepare made, instead of --data."""
    cache: str = "~/.cache/tidal"
    """Folder where data of more than 64 MB are prepared, once."""
    reader_budget: int = 256
    """Sequence length: reader tokens in a row."""
    cut_probability: float = 0.015
    """Boundary dropout: how probable a cut, as where a prompt ends, is between two characters of a block."""


@dataclass(frozen=True)
class Train:
    """Settings of `python -m tidal.train`."""

    recipe: Literal["addition", "characters", "text"] = "addition"
    """What to learn: `addition` and `characters` make their own data, `text` reads --data."""
    out: str | None = None
    """Folder of the run; none: runs/RECIPE."""
    model_size: str | None = None
    """With --recipe text: tiny, mini, small, medium, large, xl or 1.3b give other flags their defaults."""
    max_steps: int = 1000
    """Optimizer steps; the learning rate is planned over them."""
    max_seconds: float = 0.0
    """Stop after this many seconds of training; 0: no limit. The learning rate is planned over --max-steps."""
    rows: int = 32
    """Batch size: rows (packed sequences) in a batch, over all processes; of addition, documents, two a row."""
    seed: int = 0
    """Of weights, data order and samples."""
    validate_every: int = 250
    """Steps between validations, samples and checkpoints."""
    keep: int = 2
    """Checkpoints kept besides the best."""
    threads: int = 0
    """CPU threads; 0: all cores for wide models, one for narrow ones, which are slower on several beside other work."""
    workers: int = -1
    """Processes that build batches beforehand; -1: up to four beside each GPU; on a CPU one, where a core is left."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes a GPU where there is one."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With torchrun: each process has the whole model, or (fsdp) a share of every tensor, which takes less memory."""
    precision: Literal["float32", "bf16"] = "float32"
    """Of matrix products in training (autocast); weights, moments and validation are always float32."""
    compile: bool = False
    """Compile the layers with torch.compile: a slow start, then faster steps."""
    checkpoint_activations: bool = False
    """Compute layers again in the backward pass rather than remember them: less memory, about a third more time."""
    parts: int = 1
    """Micro-batches: compute each batch in this many parts, one after the other; more of them take less memory."""
    tensorboard: bool = False
    """Also write the figures for TensorBoard, which must be installed."""
    doctor: bool = True
    """Examine the untrained model first (seconds; minutes above 50M parameters), and refuse to start on a finding."""
    resume: str = "auto"
    """`auto`: continue an unfinished run in --out; `never`: a new run, beside it; or a run or checkpoint."""
    init_from: str | None = None
    """Fine-tune: begin with the weights of this run or checkpoint; its recipe, shape and settings are the defaults."""
    model: Shape = field(default_factory=Shape)
    optim: Optim = field(default_factory=Optim)
    addition: Addition = field(default_factory=Addition)
    characters: Characters = field(default_factory=Characters)
    text: Text = field(default_factory=Text)

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """The inverse of `dataclasses.asdict`, after JSON. A setting that is missing, since the version that wrote it
        had none, has its default. Raises ValueError on unknown keys and on values of another type.
        """
        return _from_json(cls(), values)


def flat(values: Mapping[str, Any], without: Collection[str] = ()) -> dict[str, Any]:
    """Settings, as `dataclasses.asdict` or JSON gives them, out of their groups, but for the groups in `without`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name not in without:
            found |= flat(value, without) if isinstance(value, dict) else {name: value}
    return found


T = TypeVar("T")


def _from_json(default: T, values: Any, complete: bool = False) -> T:
    """The dataclass `default` with those of its fields replaced that `values` has; if `complete`, it must have all."""
    kind, types = type(default).__name__, {f.name: f.type for f in dataclasses.fields(default)}  # type: ignore[arg-type]
    if not isinstance(values, dict):
        raise ValueError(f"{kind} is {values!r:.60}; it must be an object")
    if unknown := sorted(values.keys() - types.keys()):
        raise ValueError(f"{kind} has unknown keys {unknown!r:.60}; known are {sorted(types)}")
    if complete and (missing := sorted(types.keys() - values.keys())):
        raise ValueError(f"{kind} lacks the keys {missing}")
    given: dict[str, Any] = {}
    for name, value in values.items():
        old = getattr(default, name)
        if dataclasses.is_dataclass(old):
            value = _from_json(old, value, complete)
        elif isinstance(old, tuple) and isinstance(value, list) and all(isinstance(v, str) for v in value):
            value = tuple(value)
        elif isinstance(old, float) and type(value) is int:
            value = float(value)
        elif type(value) is not type(old) and not (types[name] == "str | None" and isinstance(value, str | None)):
            raise ValueError(f"{kind}: {name} is {value!r:.60}, which is no {types[name]}")
        given[name] = value
    return type(default)(**given)
