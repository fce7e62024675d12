"""Tensor code recorded once as a CUDA graph and replayed: a decoding step is some hundred small kernels, and what
starts them one by one takes longer than they do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Recorded:
    """`function(*inputs) → Tensor`, replayed at every call after the first with the new inputs in the old ones' place.

    It may read and write other tensors, where they lie now: whoever replaces one of them makes a new recording. Shapes
    are fixed, nothing may wait for the device (no `.item()`, no boolean index), and to run it again must do no harm:
    the first call runs it before recording, so that kernels are compiled and workspaces are there.

    Follows "CUDA graphs" of PyTorch's notes (capture on a side stream, after a warm-up there).
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.replay: Callable[[], Tensor] | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function's value, for the caller to keep."""
        if self.replay is None:
            self.inputs = [x.clone() for x in inputs]
            self.replay = record(lambda: self.function(*self.inputs), inputs[0].device)
        for mine, new in zip(self.inputs, inputs, strict=True):
            mine.copy_(new)
        return self.replay().clone()


def check(device: torch.device) -> None:
    """Raise ValueError where there are no CUDA graphs."""
    if device.type != "cuda":
        raise ValueError(f"CUDA graphs need a CUDA device, the model is on {device.type}; leave them out")


def record(function: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """Run and record; what is returned runs it again, and its value is overwritten by every run."""
    with torch.cuda.device(device):
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(2):
                function()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):  # its own default stream is one for all devices: the first one's
            out = function()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay
