"""Operators: what torch, its compiler and its autograd see as one node.

As torch.library.custom_op, but for one thing: that one imports torch's compiler when an operator is first called, which
takes longer than all of torch, and which nobody needs who does not compile.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad


def operator(name: str) -> Callable[[Callable[..., Any]], OpOverload]:
    """Decorate a function of annotated arguments, which changes none of them, as the operator `name` on any device.

    What it gives is called like the function, and needs `torch.library.register_fake` and, unless its results are
    integers, either `torch.library.register_autograd` or :func:`without_gradient`.
    """

    def define(function: Callable[..., Any]) -> OpOverload:
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(name, "default", function)
        namespace, own = name.split("::")
        found: OpOverload = getattr(getattr(torch.ops, namespace), own).default
        return found

    return define


def without_gradient(operator: OpOverload) -> None:
    """Refuse to differentiate it: by itself, torch would take its gradient for zero."""

    def refuse(*_: object) -> NoReturn:
        raise NotImplementedError(f"{operator} cannot be differentiated")

    torch.library.register_autograd(operator, refuse)


def moving(*tensors: Tensor) -> bool:
    """Whether any of them has a tangent (forward-mode derivatives), which an operator would silently drop."""
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)  # type: ignore[no-untyped-call]


def learning(*tensors: Tensor) -> bool:
    """Whether any of them will get a gradient."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
