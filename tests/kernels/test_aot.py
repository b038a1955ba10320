"""Every Triton kernel compiles without a GPU, and none spills."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from gardo_kernels import aot

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile"
)


def test_every_kernel_is_recorded_for_every_dtype():
    launches = aot.record()
    pointers = {}
    for launch in launches:
        dtypes = {kind for _, kind in launch.signature if kind.startswith("*")}
        pointers.setdefault(launch.kernel.__name__, set()).update(dtypes)
    over_latents = {
        "_step_kernel", "residual_kernel", "_velocity_grad_kernel", "_sums_kernel", "_grad_kernel",
        "_nearest_kernel",
    }  # fmt: skip
    assert set(pointers) == over_latents | {"_log_prob_kernel", "_finish_kernel"}
    for name in over_latents:
        assert {"*fp32", "*fp16", "*bf16"} <= pointers[name], name
    assert len({launch.name for launch in launches}) > 50


@pytest.mark.slow
@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_kernels_compile_without_spills(arch):
    """The fullest form of each kernel; `python -m gardo_kernels.aot` compiles all of them."""
    fullest = {}
    for launch in aot.record():
        half = any(kind == "*bf16" for _, kind in launch.signature)
        seeded = any(kind == "*i64" for _, kind in launch.signature)
        flags = sum(value is True for _, value in launch.constants)
        key, rank = launch.kernel, (seeded, flags, half)
        if key not in fullest or rank >= fullest[key][0]:
            fullest[key] = (rank, launch)
    assert len(fullest) == 9
    for _, launch in fullest.values():
        compiled = aot.compile_launch(launch, arch)
        assert compiled.spilled == 0, compiled
        assert 0 < compiled.registers <= 128, compiled


def test_launching_is_restored_after_recording():
    from gardo_kernels import triton_helpers

    before = triton_helpers.launch
    aot.record()
    assert triton_helpers.launch is before
    assert torch.cuda.is_available() or not torch.cuda.is_initialized()
