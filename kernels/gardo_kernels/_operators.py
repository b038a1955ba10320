"""Differentiable kernels as PyTorch operators ``torch.ops.gardo.*``.

``torch.library.custom_op`` registers the others. Its automatic autograd wrapper, though, spends
time quadratic in the number of arguments on every call (0.3 ms for the GRPO loss, more than the
kernels take), so the operators with a gradient bring their own autograd function.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

_LIBRARY = torch.library.Library("gardo", "FRAGMENT")


def kernels(op: str, backend: str) -> ModuleType:
    """The module of ``op`` for ``backend``, imported when first used."""
    return importlib.import_module(f"gardo_kernels.ops.{op}.{backend}")


def differentiable_operator(
    name: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    function: type[torch.autograd.Function],
) -> Callable[..., Any]:
    """Define ``gardo::name`` with the signature of ``kernel`` and return it.

    ``kernel`` runs on the CPU and on CUDA, ``fake`` gives outputs without data, and the ``forward``
    of ``function`` calls the operator through :func:`below_autograd`.
    """
    schema = torch.library.infer_schema(kernel, mutates_args=())
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    # Compiled code that calls the operator must not try to trace into it.
    opaque = torch.compiler.disable(kernel)
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, opaque, key)
    torch.library.register_fake(f"gardo::{name}", fake, lib=_LIBRARY)
    op: Callable[..., Any] = getattr(torch.ops.gardo, name).default

    def differentiate(*args: Any) -> Any:
        if torch.is_grad_enabled():
            return function.apply(*args)
        return below_autograd(op, *args)

    _LIBRARY.impl(name, differentiate, "Autograd")
    return op


def below_autograd(op: Callable[..., Any], *args: Any) -> Any:
    """Call an operator's kernel, past its autograd registration."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)
