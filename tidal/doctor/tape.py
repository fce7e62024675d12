"""Recording what a model is fed, what its layers give, and how much its attention gives to every key."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tidal.doctor.report import Skip
from tidal.layers import Layer, View
from tidal.model import TidalTransformer
from tidal.streams import Batch

FED = ("reader ids", "reader positions", "reader places", "writer ids", "writer positions", "writer places", "suffixes",
       "recalled")  # fmt: skip


class Tape:
    """A stand-in for a model, to be passed to a decoder or given a batch, that remembers all it is fed.

    It shares the weights of the model. Entries are lists of tensors [B, L, …], one for each call; of documents that
    are decoded alone, `row` puts them in one row, so that they compare with a training pass.
    """

    def __init__(self, model: TidalTransformer) -> None:
        self.entries: dict[str, list[Tensor]] = {}
        self.model = stand_in(model, read=self._read, write=self._write)
        self._original = model

    def _read(self, ids: Tensor, places: Tensor, views: list[View]) -> Tensor:
        self._add("reader ids", ids)
        self._add("reader places", places)
        if views:  # without reader layers only the writer is given them, as positions of keys
            self._add("reader positions", views[0].q_position)
        with self._layers("reader"):
            return self._original.read(ids, places, views)

    def _write(self, ids: Tensor, places: Tensor, suffixes: Tensor, recalled: Tensor, context: Tensor,
               views: list[View], hints: Tensor | None = None) -> Tensor:  # fmt: skip
        self._add("writer ids", ids)
        self._add("writer places", places)
        self._add("writer positions", views[0].q_position)
        self._add("suffixes", suffixes)
        self._add("recalled", recalled)
        self._add("context", context)
        if hints is not None:
            self._add("hints", hints)
        with self._layers("writer"):
            return self._original.write(ids, places, suffixes, recalled, context, views, hints)

    def _add(self, name: str, value: Tensor) -> None:
        self.entries.setdefault(name, []).append(value.detach().clone())

    @contextmanager
    def _layers(self, side: str) -> Iterator[None]:
        layers: nn.ModuleList = getattr(self._original, side)
        modules = {**{f"{side}.{i}": layer for i, layer in enumerate(layers)},
                   f"{side}_norm": getattr(self._original, f"{side}_norm")}  # fmt: skip
        handles = [module.register_forward_hook(lambda _m, _i, out, name=name: self._add(name, out))
                   for name, module in modules.items()]  # fmt: skip
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def row(self) -> dict[str, Tensor]:
        """Of a single row, all calls behind each other, [L, …], in the order in which they first came."""
        return {name: torch.cat([part[0] for part in parts]) for name, parts in self.entries.items()}


def stand_in(model: TidalTransformer, **methods: Any) -> TidalTransformer:
    """A shallow copy, which shares all weights, with some methods replaced."""
    other = copy.copy(model)
    other.__dict__.update(methods)
    return other


# -------------------------------------------------------------------------------- attention that is given


def attention_without_content(model: TidalTransformer, batch: Batch) -> dict[str, Tensor]:
    """How much attention every query of a training pass gives to every key when all queries are zero.

    What is left is the mask and ALiBi: weight[i, k] = exp(−slope · distance) / Σ over the keys that i sees, exactly 0
    for the others. It is read off the gradient of the attention's output in the values, which are its weights, so
    that the very call which trains is measured, whatever is inside. For one row: {layer: [heads, queries, keys]};
    the keys of the first writer layer are the memory and then the writer's own.
    """
    outputs: dict[str, Tensor] = {}
    leaves: dict[str, list[Tensor]] = {}
    handles = []
    layers = {f"{side}.{i}": layer for side in ("reader", "writer")
              for i, layer in enumerate(getattr(model, side)) if layer.attends}  # fmt: skip
    for name, layer in layers.items():

        def detached(_m: nn.Module, inputs: tuple[Tensor, View]) -> tuple[Tensor, View]:
            return inputs[0].detach(), inputs[1]

        def leaf(_m: nn.Module, _i: object, out: Tensor, name: str = name) -> Tensor:
            leaves.setdefault(name, []).append(new := out.detach().requires_grad_())
            return new

        def keep(_m: nn.Module, inputs: tuple[Tensor], name: str = name) -> None:
            outputs[name] = inputs[0]

        handles += [layer.register_forward_pre_hook(detached), layer.key_value.register_forward_hook(leaf),
                    layer.query.register_forward_hook(lambda _m, _i, out: torch.zeros_like(out)),
                    layer.out.register_forward_pre_hook(keep)]  # fmt: skip
    try:
        with torch.enable_grad():
            model.states(batch)
        return {name: _weights(layer, outputs[name], leaves[name]) for name, layer in layers.items()}
    finally:
        for handle in handles:
            handle.remove()


def _weights(layer: Layer, out: Tensor, values: list[Tensor]) -> Tensor:
    """[heads, queries, keys]: heads that share keys are told apart by the dimension of the value that is asked for."""
    group, dims = layer.n_heads // layer.n_kv_heads, layer.d_head
    if group > dims:
        raise Skip(f"{group} heads share a key head of width {dims}; they cannot be told apart")
    asked = torch.zeros(layer.n_heads, dims, dtype=out.dtype)
    asked[torch.arange(layer.n_heads), torch.arange(layer.n_heads) % group] = 1
    rows = []
    for i in range(out.shape[1]):
        gradients = torch.autograd.grad((out[0, i] * asked.flatten()).sum(), values, retain_graph=True)
        v_kgd = torch.cat([g[0].view(-1, 2, layer.n_kv_heads, dims)[:, 1] for g in gradients])
        rows.append(v_kgd[..., :group].flatten(1))  # [keys, heads]
    return torch.stack(rows).permute(2, 0, 1)
