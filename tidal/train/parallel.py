"""Several processes that train one model, with torch's own engines: DDP, or FSDP2 for models that need more memory.

    rows of a batch     0 1 2 3 │ 4 5 6 7          each process builds and computes its own
    loss                Σ nats  │ Σ nats           over the units of the WHOLE batch, times the number of processes,
    gradient                  mean                 since the engines take the mean over them
    weights, moments    DDP: whole in each         FSDP2: rows of each tensor, gathered layer by layer

Everything that is not a gradient (counts, signals, the clock, "wait for me") goes over gloo, between CPUs.
"""

from __future__ import annotations

import contextlib
import datetime
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tidal import ranks
from tidal.cli import UserError
from tidal.config import Train
from tidal.model import TidalTransformer
from tidal.ranks import OwnError

TIMEOUT = datetime.timedelta(days=30)
"""Of waiting: the first process may prepare data for hours, or wait for a full disk. torchrun sees who has ended."""


class Parallel:
    """This process among those that train together. Alone, none of its methods does anything."""

    def __init__(self, rank: int = 0, size: int = 1, engine: Literal["ddp", "fsdp"] = "ddp") -> None:
        self.rank, self.size, self.engine = rank, size, engine

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files, validates and shows samples."""
        return self.rank == 0

    def __str__(self) -> str:
        return "" if self.size == 1 else f"{self.size} processes ({self.engine}), "

    # ------------------------------------------------------------------------------------ the gradient

    def wrap(self, model: TidalTransformer, settings: Train) -> nn.Module:
        """What is called in place of `model`, with its layers compiled, recomputed, copied or sharded as is asked.

        Under FSDP the parameters of `model` itself become DTensors, so the optimizer is made afterwards.
        """
        model.recompute = settings.checkpoint_activations
        if settings.compile:
            for layer in (*model.reader, *model.writer):
                layer.compile(dynamic=True)  # rows differ in length from step to step: one graph for all
        if self.size == 1:
            return model
        if self.engine == "ddp":
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch 2.13 renames an option
                return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
        from torch.distributed.device_mesh import init_device_mesh  # these take a second
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(model.device.type, (self.size,))
        # The model itself calls upon the first writer layer for the keys of its memory, so that one is not by itself.
        for layer in (*model.reader, *list(model.writer)[model.has_memory :]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    def no_sync(self, wrapped: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Around a forward and a backward pass, whose gradients are added up here until the `last` one.

        FSDP reduces them each time: what it would add up here has the size of the whole model.
        """
        if last or not isinstance(wrapped, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return wrapped.no_sync()

    # ---------------------------------------------------------------------------------------- agreeing

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """The sums of `values` over all processes, in float64."""
        return self._all_reduce(values, dist.ReduceOp.SUM)

    def all_reduce_max(self, values: Sequence[float]) -> list[float]:
        """The highest of each of `values`."""
        return self._all_reduce(values, dist.ReduceOp.MAX)

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self._all_reduce([0.0], dist.ReduceOp.SUM)

    def broadcast(self, text: str) -> str:
        """The `text` of the first process."""
        if self.size == 1:
            return text
        self.barrier()
        content = torch.tensor(list(text.encode()), dtype=torch.uint8)
        length = torch.tensor(len(content))
        dist.broadcast(length, src=0)
        if not self.leads:
            content = torch.zeros(int(length), dtype=torch.uint8)
        dist.broadcast(content, src=0)
        return bytes(content.tolist()).decode()

    def check_same(self, found: str) -> None:
        """Raise UserError in a process that has `found` something else than the first one."""
        if self.broadcast(found) != found:
            raise OwnError(f"process {self.rank} finds other data, another tokenizer or another checkpoint than the "
                           "first one; all processes must see the same files")  # fmt: skip

    def _all_reduce(self, values: Sequence[float], how: dist.ReduceOp.RedOpType) -> list[float]:
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        work = dist.all_reduce(tensor, how, async_op=True)
        pause = 1e-5
        while not work.is_completed():  # not `wait`, in which signals would have to wait as well
            time.sleep(pause)
            pause = min(1.1 * pause, 0.02)  # so it is late by a tenth of what it has waited, at most
        work.wait()
        reduced: list[float] = tensor.tolist()
        return reduced

    # ----------------------------------------------------------------------------------- whole tensors

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same with sharded tensors put together, on the CPU, one after the other; {} but in the first process."""
        kept: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            full = full_tensor(tensor)
            if self.leads:
                kept[name] = full if full is tensor else full.cpu()
        return kept

    def unsharded(self, model: TidalTransformer) -> TidalTransformer:
        """A model that one process alone can use: `model`, or of a sharded one, in the first process, a copy.

        The copy is whole, and on the CPU: it is moved where it may turn out that there is no memory for it. To be
        called by all.
        """
        if not is_sharded(next(model.parameters())):
            return model
        tensors = self.gathered(model.state_dict())
        if not self.leads:
            return model
        copy = TidalTransformer(model.config, model.foretold.spelling if model.foretold else None)
        copy.load_state_dict(tensors)
        return copy


@contextlib.contextmanager
def joined(engine: Literal["ddp", "fsdp"], device: torch.device) -> Iterator[Parallel]:
    """Meet the other processes that torchrun started; alone, do nothing.

    Raises UserError where one of them has ended: torchrun then ends the rest, which cannot go on.
    """
    if ranks.size() == 1:
        yield Parallel()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the one that FSDP moves its weights to
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    parallel = Parallel(ranks.rank(), ranks.size(), engine)
    try:
        yield parallel
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise UserError("another process of this run has ended, so it cannot go on; the same command continues from "
                        "the last checkpoint") from error  # fmt: skip
    parallel.barrier()
    dist.destroy_process_group()


def is_lost(error: RuntimeError) -> bool:
    """Whether an error says that another process cannot be reached; gloo has only words for it."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def is_sharded(tensor: Tensor) -> bool:
    """Whether FSDP has cut a tensor up. (DTensor's module would take a second to import.)"""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor, put together where it is sharded; to be called by all processes."""
    full: Tensor = getattr(tensor, "full_tensor", lambda: tensor)()
    return full


def shard_like(tensor: Tensor, full: Tensor) -> Tensor:
    """A whole tensor, cut up as `tensor` is; to be called by all processes with the same values."""
    if not is_sharded(tensor):
        return full
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(tensor, DTensor)
    return distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None)
