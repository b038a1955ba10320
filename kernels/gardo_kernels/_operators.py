"""Kernels as PyTorch operators ``torch.ops.gardo.*``.

Registered by hand: the wrapper of ``torch.library.custom_op`` takes 30 microseconds a call, with a
gradient a time quadratic in the number of arguments (0.3 ms for the GRPO loss, more than the
kernels take).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

_LIBRARY = torch.library.Library("gardo", "FRAGMENT")


@functools.cache
def kernels(op: str, backend: str) -> ModuleType:
    """The module of ``op`` for ``backend``, imported when first used."""
    return importlib.import_module(f"gardo_kernels.ops.{op}.{backend}")


def operator(name: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define ``gardo::name`` with the signature of ``kernel`` and return it.

    ``kernel`` runs on the CPU and on CUDA, ``fake`` gives outputs without data. Callers detach the
    inputs: there is no gradient.
    """
    schema = torch.library.infer_schema(kernel, mutates_args=())
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    # Compiled code that calls the operator must not try to trace into it.
    opaque = torch.compiler.disable(kernel)
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, opaque, key)
    torch.library.register_fake(f"gardo::{name}", fake, lib=_LIBRARY)
    op: Callable[..., Any] = getattr(torch.ops.gardo, name).default
    return op


def differentiable_operator(
    name: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    function: type[torch.autograd.Function],
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """As :func:`operator`, with a gradient: the operator, and a function to call it by.

    The ``forward`` of ``function`` calls the operator through :func:`below_autograd`.
    """
    op = operator(name, kernel, fake)

    def differentiate(*args: Any) -> Any:
        if torch.is_grad_enabled():
            return function.apply(*args)
        return below_autograd(op, *args)

    _LIBRARY.impl(name, differentiate, "Autograd")

    def call(*args: Any) -> Any:
        # What the dispatcher would call, without its 20 microseconds for so many arguments.
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return op(*args)
        return differentiate(*args)

    return op, call


def keep(ctx: Any, *tensors: torch.Tensor | None) -> None:
    """``ctx.save_for_backward``, with copies of what was made in inference mode."""
    # The mode of the forward pass of an autograd function tells nothing: gradients are off in it.
    ctx.save_for_backward(
        *(t.clone() if t is not None and t.is_inference() else t for t in tensors)
    )


def without_grad(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor.detach()``, which takes time, only where there is something to detach."""
    return tensor.detach() if tensor.requires_grad else tensor


def below_autograd(op: Callable[..., Any], *args: Any) -> Any:
    """Call an operator's kernel, past its autograd registration."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)
