"""Kernels as PyTorch operators ``torch.ops.gardo.*``, each registered from one signature.

An op's ``native`` function is the only place that spells its operands: the schema is read from it,
every other backend has a function of that name and those operands, and what it returns is declared
once, for operators that are traced without data.

Not ``torch.library.custom_op``: its wrapper takes 30 microseconds a call, with a gradient a time
quadratic in the number of arguments (0.3 ms for the GRPO loss, more than the kernels take).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("gardo", "FRAGMENT")


class Gradient(NamedTuple):
    """How an operator is differentiated. Its first output is the only differentiable one."""

    #: Names of the operands that it is differentiable in.
    of: tuple[str, ...]
    #: From operands and outputs to the tensors that the backward pass needs.
    saved: Callable[[Sequence[Any], Sequence[Tensor]], tuple[Tensor | None, ...]]
    #: From the backend, the incoming gradient, the operands that are no tensors (by name) and the
    #: saved tensors to the gradients by ``of``.
    backward: Callable[..., Sequence[Tensor | None]]


def operator(
    kernel: Callable[..., Any],
    outputs: Callable[..., Any],
    gradient: Gradient | None = None,
) -> Callable[..., Any]:
    """Define ``gardo::<name of kernel>``; return ``call(backend, *operands)``.

    The kernel of a backend is the function of the same name in the module of that name beside the
    module of ``kernel``. It sees no gradients. ``outputs`` takes the operands too and returns
    tensors of the shapes, dtypes and device of the results, without their data.
    """
    name = kernel.__name__
    package = kernel.__module__.rpartition(".")[0]
    schema = torch.library.infer_schema(kernel, mutates_args=())
    _LIBRARY.define(f"{name}(str backend, {schema[1:]}", tags=(torch.Tag.pt2_compliant_tag,))
    registered: Callable[..., Any] = getattr(torch.ops.gardo, name).default

    @functools.cache
    def kernel_of(backend: str) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(importlib.import_module(f"{package}.{backend}"), name)
        return found

    def run(backend: str, *operands: Any) -> Any:
        return kernel_of(backend)(*operands)

    def below_autograd(backend: str, *operands: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return registered(backend, *operands)

    # Compiled code that calls the operator must not try to trace into it.
    opaque = torch.compiler.disable(run)
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, opaque, key)
    torch.library.register_fake(
        f"gardo::{name}", lambda backend, *operands: outputs(*operands), lib=_LIBRARY
    )
    if gradient is None:

        def call(backend: str, *operands: Any) -> Any:
            if torch.is_grad_enabled():
                operands = tuple(map(_detached, operands))
            return (run if _is_plain(operands[0]) else registered)(backend, *operands)

        return call

    names = [argument.name for argument in registered._schema.arguments[1:]]  # type: ignore[attr-defined]
    positions = [names.index(one) for one in gradient.of]
    function = _autograd_function(names, gradient)

    def differentiate(execute: Callable[..., Any], backend: str, *operands: Any) -> Any:
        inputs = [operands[p] for p in positions]
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
            return function.apply(execute, backend, operands, *inputs)
        return execute(backend, *operands)

    _LIBRARY.impl(name, functools.partial(differentiate, below_autograd), "Autograd")

    def differentiable_call(backend: str, *operands: Any) -> Any:
        if _is_plain(operands[0]):
            return differentiate(run, backend, *operands)
        return registered(backend, *operands)

    return differentiable_call


def _autograd_function(names: list[str], gradient: Gradient) -> type[torch.autograd.Function]:
    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, execute: Any, backend: str, operands: Any, *inputs: Any) -> Any:
            results = execute(backend, *operands)
            several = isinstance(results, tuple)
            outputs = results if several else (results,)
            keep(ctx, *gradient.saved(operands, outputs))
            ctx.backend = backend
            ctx.numbers = {
                name: value
                for name, value in zip(names, operands, strict=True)
                if isinstance(value, (float, str))
            }
            if several:
                ctx.mark_non_differentiable(*outputs[1:])
            return results

        @staticmethod
        def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
            by = gradient.backward(ctx.backend, grad, ctx.numbers, *ctx.saved_tensors)
            return None, None, None, *by

    return Differentiable


def _is_plain(tensor: Tensor) -> bool:
    """Whether nothing but autograd looks at this call: then the dispatcher is left out.

    It takes 10 to 20 microseconds for so many arguments, which a GPU would wait for. Tracers,
    dispatch modes, function transforms, the profiler and tensor subclasses see the operator.
    """
    return not (
        torch.compiler.is_compiling()
        or type(tensor) not in _TENSOR_TYPES
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


_TENSOR_TYPES = (Tensor, torch.nn.Parameter)


def keep(ctx: Any, *tensors: Tensor | None) -> None:
    """``ctx.save_for_backward``, with copies of what was made in inference mode."""
    # The mode of the forward pass of an autograd function tells nothing: gradients are off in it.
    ctx.save_for_backward(
        *(t.clone() if t is not None and t.is_inference() else t for t in tensors)
    )


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach() if value.requires_grad else value
    return value
