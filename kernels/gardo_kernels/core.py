"""Loads the compiled C++ core, and turns tensors into the addresses that it takes.

The core knows neither torch nor Python objects. The checks here are those that memory safety needs
(dtype, shape, device, contiguity): they raise ``TypeError`` or ``ValueError`` with the name of the
tensor. The meaning of values is left to the ops, whose ``native`` modules call the core.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

import torch  # first: the core then shares torch's OpenMP runtime instead of loading its own
from torch import Tensor

_MODULE = "gardo_kernels._C"
_CPU = torch.device("cpu")
#: dtypes of latents that the core reads, in the order of its codes; it computes in float32
LATENT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_DTYPE_CODES = {dtype: code for code, dtype in enumerate(LATENT_DTYPES)}


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(_MODULE), None
    except ModuleNotFoundError as error:
        if error.name != _MODULE:
            raise
        return None, (
            "the C++ core is not built (installed with GARDO_NO_NATIVE=1, or from a source tree "
            "without `pip install -e .`)"
        )
    except ImportError as error:  # built, but it does not load here, e.g. for an older libstdc++
        return None, f"the C++ core does not load: {error}"


_core, _reason = _load()


def is_available() -> bool:
    """Whether the compiled core is loaded."""
    return _core is not None


def unavailable_reason() -> str | None:
    """Why the compiled core is not loaded; None when it is."""
    return _reason


def has_openmp() -> bool:
    """Whether the core is loaded and was built with OpenMP."""
    return _core is not None and bool(_core.has_openmp)


def has_cuda() -> bool:
    """Whether the core is loaded and was built with CUDA."""
    return _core is not None and bool(_core.has_cuda)


def cuda_unavailable_reason() -> str | None:
    """Why the core cannot work on CUDA tensors; None when it can."""
    if _core is None:
        return _reason
    if not _core.has_cuda:
        return "the C++ core was built without CUDA (nvcc was not found, or GARDO_CUDA=off)"
    return None


def require_core() -> ModuleType:
    """The compiled core; ``RuntimeError`` with the reason where there is none."""
    if _core is None:
        raise RuntimeError(f"backend 'native' is not available: {_reason}")
    return _core


def array(
    name: str,
    tensor: Tensor | None,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    device: torch.device = _CPU,
) -> int:
    """Address of a contiguous array of exactly this dtype, shape and device; 0 for None."""
    if tensor is None:
        return 0
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
    if tensor.device != device or tensor.shape != shape or not tensor.is_contiguous():
        _refuse(name, tensor, shape, device)
    return tensor.data_ptr()


def latents(name: str, tensor: Tensor | None, like: Tensor) -> tuple[int, int]:
    """Address and dtype code of CPU latents of the shape of ``like``; (0, 0) for None."""
    if tensor is None:
        return 0, 0
    code = _DTYPE_CODES.get(tensor.dtype)
    if code is None:
        raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {tensor.dtype}")
    if not tensor.is_cpu or tensor.shape != like.shape or not tensor.is_contiguous():
        _refuse(name, tensor, like.shape, _CPU)
    return tensor.data_ptr(), code


def row_scalar(name: str, tensor: Tensor, rows: int) -> tuple[int, int]:
    """Address and stride of a float32 CPU scalar, one for all rows or one per row."""
    if tensor.dtype != torch.float32:
        raise TypeError(f"{name}: expected dtype torch.float32, got {tensor.dtype}")
    if not tensor.is_cpu:
        raise ValueError(f"{name}: expected a CPU tensor, got device {tensor.device}")
    if tensor.dim() == 0:
        return tensor.data_ptr(), 0
    if tensor.shape != (rows,):
        raise ValueError(f"{name}: expected shape [] or [{rows}], got {list(tensor.shape)}")
    return tensor.data_ptr(), tensor.stride(0)


def extent(like: Tensor) -> dict[str, int]:
    """Rows, elements per row and the threads that PyTorch is set to use."""
    if like.dim() == 0:
        raise ValueError("velocity: expected shape [B, ...], got a 0-d tensor")
    rows = like.shape[0]
    return {
        "rows": rows,
        "row_size": like.numel() // rows if rows else 0,
        "num_threads": torch.get_num_threads(),
    }


def choice(name: str, value: str, choices: tuple[str, ...]) -> int:
    """The core's code of one of ``choices``: its position."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return choices.index(value)


def as_float32(tensor: Tensor) -> Tensor:
    """A contiguous float32 tensor: the tensor itself where it is one."""
    return (tensor if tensor.dtype == torch.float32 else tensor.to(torch.float32)).contiguous()


def dense(tensor: Tensor | None) -> Tensor | None:
    """A contiguous tensor: the tensor itself where it is one; None for None."""
    return None if tensor is None else tensor.contiguous()


# New tensors from these cost half of what torch.empty takes to read a dtype and a device.
_FLOAT32 = torch.empty(1, dtype=torch.float32, device=_CPU)
_FLOAT32_SCALAR = torch.empty((), dtype=torch.float32, device=_CPU)


def float32(*shape: int) -> Tensor:
    """An uninitialised float32 CPU tensor for results."""
    return _FLOAT32.new_empty(*shape) if shape else torch.empty_like(_FLOAT32_SCALAR)


def enqueue(
    function: Callable[..., None], device: torch.device, workspace_bytes: int, **arguments: Any
) -> None:
    """Call a CUDA function of the core on the current stream, with a workspace."""
    with torch.cuda.device(device):
        # Freed on return: PyTorch's allocator hands it out again in the order of the stream.
        workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=device)
        function(
            **arguments,
            workspace=workspace.data_ptr(),
            workspace_size=workspace_bytes,
            stream=torch.cuda.current_stream(device).cuda_stream,
        )


def require_device(name: str, tensor: Tensor) -> torch.device:
    """The device of a tensor that the core can work on: the CPU, or CUDA where it was built."""
    device = tensor.device
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name}: expected a CPU or CUDA tensor, got device {device}")
    reason = cuda_unavailable_reason() if device.type == "cuda" else None
    if reason is not None:
        raise RuntimeError(f"backend 'native' is not available on {device}: {reason}")
    return device


def _refuse(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> NoReturn:
    if tensor.device != device:
        expected = "a CPU tensor" if device == _CPU else f"device {device}"
        raise ValueError(f"{name}: expected {expected}, got device {tensor.device}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
