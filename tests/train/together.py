"""Several processes that train together, without torchrun: each is forked off one that has imported torch already."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn

from tests.train.runs import CPU, SETTINGS, Hooked, apart, gradient, short_samples, stop_at
from tidal import checkpoint
from tidal.cli import UserError
from tidal.config import Train
from tidal.model import Losses, TidalTransformer
from tidal.streams import Batch
from tidal.train import __main__ as command
from tidal.train import disk, loop, records
from tidal.train.loop import train
from tidal.train.muon import Muon
from tidal.train.parallel import Parallel, full_tensor, joined, shard_like
from tidal.train.resume import look_in
from tidal.train.stop import Stop, Stopped

SECONDS = 240.0
"""After which a test gives a process up."""
CONTEXT = multiprocessing.get_context("forkserver")
TWICE = dataclasses.replace(SETTINGS, parts=2, optim=dataclasses.replace(SETTINGS.optim, accumulate=2))
UNCLIPPED = dataclasses.replace(TWICE, optim=dataclasses.replace(TWICE.optim, clip=1e9))
"""So that a gradient that is too small or too large stays so."""
OPTIONS = dataclasses.replace(UNCLIPPED, compile=True, checkpoint_activations=True)
"""Those that change how a gradient is computed, and not what it is."""


# ------------------------------------------------------------------------------------------ processes


def _begin(rank: int, size: int, port: int, said: str, answer: Connection, work: Callable[..., Any], more: Any) -> None:
    """What a process does, in the surroundings that torchrun would give it."""
    os.environ.update(TORCHELASTIC_RUN_ID="tests", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size),
                      LOCAL_WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
    torch.set_num_threads(1)
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 2)
    sys.stderr = os.fdopen(descriptor, "w", buffering=1)
    answer.send(work(*more))


@contextlib.contextmanager
def processes(size: int, home: Path, work: Callable[..., Any], *more: Any) -> Iterator[list[tuple[BaseProcess, Any]]]:
    """Processes that do `work(*more)`, with the ends of their pipes; each writes stderr into `home/RANK.txt`."""
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # of the process that all are forked off
    CONTEXT.set_forkserver_preload(["tests.train.together", "torch._dynamo", "torch.distributed.fsdp"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(size):
        ours, its = CONTEXT.Pipe()
        process = CONTEXT.Process(target=_begin, args=(rank, size, port, f"{home}/{rank}.txt", its, work, more))
        process.start()
        its.close()
        started.append((process, ours))
    try:
        yield started
    finally:
        for process, _ in started:
            process.kill()
            process.join()


def together(size: int, home: Path, work: Callable[..., Any], *more: Any) -> list[Any]:
    """What each of `size` processes comes to."""
    with processes(size, home, work, *more) as started:
        answers = []
        for rank, (_, pipe) in enumerate(started):
            assert pipe.poll(SECONDS), f"no answer from process {rank}"
            try:
                answers.append(pipe.recv())
            except EOFError:
                raise AssertionError((home / f"{rank}.txt").read_text()) from None
        return answers


# ----------------------------------------------------------------------------------------------- runs


@dataclasses.dataclass(frozen=True)
class Job:
    """One run, or a part of it, in the folder `name`."""

    name: str
    engine: Literal["ddp", "fsdp"] = "ddp"
    settings: Train = SETTINGS
    resume: bool = False
    until: int | None = None
    """The last process, and only that one, gets a signal in the step before this one."""


def eager_blocks() -> Any:
    """Trace as --compile does, but run the graphs as they are: to compile them takes a minute."""
    real = nn.Module.compile
    return mock.patch.object(nn.Module, "compile", lambda self, **options: real(self, **options, backend="eager"))


@contextlib.contextmanager
def writing_nothing() -> Iterator[None]:
    """Whatever writes a file is an error."""
    with contextlib.ExitStack() as stack:
        for module, name in ((checkpoint, "write_checkpoint"), (checkpoint, "atomic_write"), (loop, "atomic_write"),
                             (disk, "append"), (records, "append"), (records, "atomic_write"),
                             (checkpoint, "prune")):  # fmt: skip
            stack.enter_context(mock.patch.object(module, name, side_effect=AssertionError(name)))
        yield


def run_jobs(jobs: list[Job], home: Path, others: list[Callable[[Parallel], float]]) -> list[float]:
    """In one of several processes: the jobs, one after the other, and what `others` come to."""
    with joined("ddp", CPU) as parallel, eager_blocks(), short_samples():
        for job in jobs:
            parallel.barrier()
            with contextlib.nullcontext() if parallel.leads else writing_nothing():
                _run(job, home / job.name, Parallel(parallel.rank, parallel.size, job.engine))
        return [other(parallel) for other in others]


def _run(job: Job, out: Path, parallel: Parallel) -> None:
    out.mkdir(exist_ok=True)
    stop, recipe = Stop(), Hooked(job.settings)
    if job.until is not None and parallel.rank == parallel.size - 1:
        recipe.hook = stop_at(stop, "batch", job.until - 1)
    before = look_in(out) if job.resume else None
    parallel.barrier()
    try:
        train(job.settings, recipe, out, stop=stop, found=before, parallel=parallel)
    except Stopped:
        assert job.until == look_in(out).saved.step
    else:
        assert job.until is None


def run_command(argv: list[str], home: Path) -> int:
    """`python -m tidal.train`, as one of several processes: its exit code."""
    os.chdir(home)
    try:
        return command.run(argv)
    except UserError as error:
        print(f"tidal.train: error: {error}", file=sys.stderr)
        return 2


def one_without_memory(home: Path) -> str:
    """The second process has none; what each says."""
    real = TidalTransformer.forward

    def forward(model: TidalTransformer, batch: Batch) -> Losses:
        raise torch.OutOfMemoryError("CUDA out of memory")

    mine = forward if os.environ["RANK"] == "1" else real
    try:
        with joined("ddp", CPU) as parallel, mock.patch.object(TidalTransformer, "forward", mine):
            settings = dataclasses.replace(SETTINGS, rows=8)  # two rows in each process, of two documents
            train(settings, Hooked(settings), home, parallel=parallel)
    except UserError as error:
        return str(error)
    return "nothing"


def not_finite(home: Path) -> tuple[str, bool]:
    """What each says of weights that are NaN, and whether what they were fed is written down by then; that takes the
    first process a while."""
    real_model, real_search = loop.model_for, loop.bad_batch

    def damaged(*of: Any) -> TidalTransformer:
        model = real_model(*of)
        nn.init.constant_(model.writer_norm.weight, math.nan)
        return model

    def slow(*of: Any, **more: Any) -> dict[str, Any]:
        time.sleep(1)
        return real_search(*of, **more)

    try:
        with joined("ddp", CPU) as parallel, mock.patch.multiple(loop, model_for=damaged, bad_batch=slow):
            train(SETTINGS, Hooked(SETTINGS), home, parallel=parallel)
    except UserError as error:
        return str(error), (home / "bad-batch.json").exists()
    return "nothing", False


# ------------------------------------------------------------------------------------------- gradients


@functools.cache
def gradient_alone() -> list[Tensor]:
    """The gradient by one process; two batches in two parts each, and no clipping."""
    return gradient(UNCLIPPED)[0]


def ddp_apart(parallel: Parallel, settings: Train = UNCLIPPED) -> float:
    """Of the gradient by several processes to that by one."""
    return apart(gradient(settings, parallel=parallel)[0], gradient_alone())


def fsdp_apart(parallel: Parallel) -> float:
    """The same with sharded parameters."""
    return ddp_apart(Parallel(parallel.rank, parallel.size, "fsdp"))


def ddp_with_options_apart(parallel: Parallel) -> float:
    """Layers compiled and computed again in several processes, to the plain gradient of one."""
    return ddp_apart(parallel, OPTIONS)


def fsdp_with_options_apart(parallel: Parallel) -> float:
    """The same with sharded parameters."""
    return ddp_apart(Parallel(parallel.rank, parallel.size, "fsdp"), OPTIONS)


def bug_own_units(parallel: Parallel) -> float:
    """Each process divides by the units of its own rows."""
    with mock.patch.object(Parallel, "all_reduce_sum", lambda self, values: list(values)):
        return ddp_apart(parallel)


def bug_mean(parallel: Parallel) -> float:
    """It is forgotten that DDP takes the mean."""
    real = Tensor.backward

    def backward(loss: Tensor) -> None:
        real(loss / parallel.size)

    with mock.patch.object(Tensor, "backward", backward):
        mine = gradient(UNCLIPPED, parallel=parallel)[0]
    return apart(mine, gradient_alone())


def bug_same_rows(parallel: Parallel) -> float:
    """Every process computes the same share."""
    real = Hooked.batch
    with mock.patch.object(Hooked, "batch", lambda self, step, share: real(self, step, (0, share[1]))):
        mine = gradient(UNCLIPPED, parallel=parallel)[0]
    return apart(mine, gradient_alone())


def bug_never_reduced(parallel: Parallel) -> float:
    """Each process adds up its own gradients to the end."""
    with mock.patch.object(Parallel, "no_sync", lambda self, wrapped, last: wrapped.no_sync()):
        mine = gradient(UNCLIPPED, parallel=parallel)[0]
    return apart(mine, gradient_alone())


def muon_apart(parallel: Parallel, kind: Callable[..., torch.optim.Optimizer] = Muon) -> float:
    """Two updates of sharded matrices and of whole ones; some have fewer rows than there are processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, generator, most = init_device_mesh("cpu", (parallel.size,)), torch.Generator().manual_seed(0), 0.0
    for shape in ((32, 16), (16, 48), (10, 7), (3, 8), (1, 5)):
        weight, *grads = torch.randn(3, *shape, generator=generator)
        alone, cut = nn.Parameter(weight.clone()), nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
        updates = [make([{"params": [p]}], lr=0.1, weight_decay=0.1) for make, p in ((Muon, alone), (kind, cut))]
        for grad in grads:
            alone.grad, cut.grad = grad.clone(), shard_like(cut, grad)
            for update in updates:
                update.step()
        most = max(most, apart([full_tensor(cut)], [alone]))
    return most


def torchs_muon_apart(parallel: Parallel) -> float:
    """The same by torch's own, which may also raise an error."""
    try:
        return muon_apart(parallel, functools.partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw"))
    except RuntimeError:  # "in-place operations that require placement changes are not supported"
        return 1.0
