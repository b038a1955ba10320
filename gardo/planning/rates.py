"""How fast GPUs compute by their data sheets, and how much of it is assumed to be reached."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from gardo.types import UserError

# Share of the data sheet's peak that large transformer forwards and backwards are assumed to reach.
# An assumption, not a measurement; `--utilization` changes it, `--measure` does without it.
UTILIZATION = 0.4


@dataclass(frozen=True)
class GPU:
    """A GPU by its data sheet.

    Attributes:
        memory: GB.
        half: dense TFLOP/s of bf16 or fp16 matrix products with float32 accumulation.
        single: TFLOP/s of float32 outside of tensor cores.
    """

    name: str
    memory: float
    half: float
    single: float

    def flops(self, precision: str) -> float:
        """Peak FLOP/s of matrix products (fp32 without TF32, as torch does by default)."""
        return 1e12 * (self.single if precision == "fp32" else self.half)

    def convolution_flops(self, dtype: str | None) -> float:
        """Peak FLOP/s of convolutions; cuDNN runs float32 ones as TF32, at half the half rate."""
        return 1e12 * (self.half if dtype in ("fp16", "bf16") else self.half / 2)


# NVIDIA's data sheets, figures without sparsity
_GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("rtx3090", 24, 71, 35.6),
        GPU("rtx4090", 24, 165, 82.6),
        GPU("a10", 24, 125, 31.2),
        GPU("l4", 24, 121, 30.3),
        GPU("rtx5090", 32, 210, 105),
        GPU("a100-40gb", 40, 312, 19.5),
        GPU("rtxa6000", 48, 155, 38.7),
        GPU("l40s", 48, 362, 91.6),
        GPU("rtx6000ada", 48, 364, 91.1),
        GPU("a100-80gb", 80, 312, 19.5),
        GPU("h100", 80, 989, 67),
        GPU("h200", 141, 989, 67),
        GPU("b200", 180, 2250, 75),
    )
}
DEFAULT_GPU = "h100"
# what --memory alone stands for: the commonest GPU of that size
_BY_MEMORY = ("rtx4090", "rtx5090", "a100-40gb", "l40s", "h100", "h200", "b200")


def find_gpu(name: str | None, memory: float | None) -> GPU:
    """A GPU by name, else the commonest of that memory or more, else the default.

    Raises:
        UserError: unknown name.
    """
    if name is not None:
        if name.lower() not in _GPUS:
            near = difflib.get_close_matches(name.lower(), _GPUS, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise UserError(f"--gpu: unknown GPU '{name}'{hint} (known: {', '.join(_GPUS)})")
        return _GPUS[name.lower()]
    if memory is None:
        return _GPUS[DEFAULT_GPU]
    return next((_GPUS[n] for n in _BY_MEMORY if _GPUS[n].memory >= memory), _GPUS["b200"])
