"""What a CUDA graph forbids, found on a CPU: a mode that fails where a capture would.

Operations whose result or whose shape depends on data make the host wait, random operations would
be baked into the graph, and so would tensors made from Python values. PyTorch tags the first
kinds of operations; the ways around the dispatcher are patched.
"""

from __future__ import annotations

import random
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

_FORBIDDEN = {
    torch.Tag.data_dependent_output: "reads a value",
    torch.Tag.dynamic_output_shape: "has a shape that depends on data",
    torch.Tag.nondeterministic_seeded: "draws random numbers",
}
_TENSOR_METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__")
_FROM_PYTHON = ("tensor", "as_tensor", "from_numpy")


class NotCapturable(AssertionError):
    """The code cannot run inside a CUDA graph."""


class CaptureRecorder(TorchDispatchMode):
    """Raises `NotCapturable` at the first thing inside the block that a capture would refuse."""

    def __enter__(self):
        self._patches = [
            mock.patch.object(torch.Tensor, name, _refuse(f"Tensor.{name}"))
            for name in _TENSOR_METHODS
        ] + [mock.patch.object(torch, name, _refuse(f"torch.{name}")) for name in _FROM_PYTHON]
        for patch in self._patches:
            patch.start()
        self._state = (random.getstate(), np.random.get_state()[1].tobytes())
        return super().__enter__()

    def __exit__(self, *error):
        for patch in self._patches:
            patch.stop()
        result = super().__exit__(*error)
        if self._state != (random.getstate(), np.random.get_state()[1].tobytes()):
            raise NotCapturable("Python's or numpy's random numbers were drawn")
        return result

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tag, what in _FORBIDDEN.items():
            if tag in func.tags and not _without_dropout(func, args, kwargs or {}):
                raise NotCapturable(f"{func} {what}")
        if func is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        ):
            raise NotCapturable(f"{func} with a mask has a shape that depends on data")
        return func(*args, **(kwargs or {}))


def _without_dropout(func, args, kwargs):
    """Attention is tagged as random for a dropout that is 0 here."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    return "dropout_p" in names and given.get("dropout_p", 0.0) == 0.0


def _refuse(name):
    def refused(*args, **kwargs):
        raise NotCapturable(f"{name} goes to or comes from the host")

    return refused
