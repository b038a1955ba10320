"""Inputs, backends and tolerances of the tests of the fused kernels."""

from __future__ import annotations

import os

import pytest
import torch

import gardo_kernels as gk
from gardo_kernels import core

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
RUNS_TRITON = INTERPRETED or DEVICE == "cuda"
BACKENDS = [
    pytest.param(
        "native",
        marks=pytest.mark.skipif(not core.is_available(), reason=str(core.unavailable_reason())),
    ),
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(
            not RUNS_TRITON, reason="no GPU: run by test_triton_under_the_interpreter"
        ),
    ),
]
#: Of the ops on rewards.
REWARD_BACKENDS = ["reference", BACKENDS[0]]
# A row of one element, odd rows, an empty batch, SD3, video and packed Flux latents, rows that
# take several tiles and several programs.
SHAPES = [
    (3, 1), (5,), (1, 7), (0, 4), (2, 16, 4, 4), (2, 3, 2, 3, 5), (3, 6, 4), (2, 1500), (2, 9001),
]  # fmt: skip
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Every shape in float32; in half precision those that differ in how rows are cut.
CASES = [(shape, torch.float32) for shape in SHAPES]
CASES += [(shape, dtype) for shape in ((1, 7), (3, 6, 4), (2, 9001)) for dtype in DTYPES[1:]]
KINDS = ["flow", "cps", "dance"]
# Computed in float32 from the same inputs: a few roundings, relative to the largest element.
VALUE_TOLERANCE = 2e-6
# Gradients are rounded to the dtype of the velocity: one unit in the last place.
GRAD_TOLERANCE = {torch.float32: 4e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def device_of(backend):
    return DEVICE if backend == "triton" else "cpu"


def close(actual, expected, tolerance=VALUE_TOLERANCE, scale=None):
    """Compare relative to ``scale``, the largest element unless given."""
    assert actual.shape == expected.shape
    expected = expected.detach().double()
    if scale is None:
        scale = float(expected.abs().max()) if expected.numel() else 0.0
    atol = tolerance * max(1e-30, scale)
    torch.testing.assert_close(
        actual.detach().double().cpu(), expected.cpu(), rtol=tolerance, atol=atol
    )


def wide(value):
    return value.detach().double() if isinstance(value, torch.Tensor) else value


def inputs(shape, dtype, backend, seed=0):
    g = torch.Generator().manual_seed(seed)
    v, u, ref = (torch.randn(shape, generator=g).to(dtype) for _ in range(3))
    x, prev = (torch.randn(shape, generator=g) for _ in range(2))
    return tuple(t.to(device_of(backend)) for t in (v, u, ref, x, prev))


def coefficients(kind, rows, backend):
    """One step per row, except for an odd number of rows: one step for all."""
    if rows % 2 or rows == 0:
        coef = gk.sde_coefficients(0.6, 0.5, kind=kind)
    else:
        sigmas = torch.linspace(0.9, 0.3, rows + 1)
        coef = gk.sde_coefficients(sigmas[:-1], sigmas[1:], kind=kind)
    return coef.to(device_of(backend))


def grpo_inputs(shape, dtype, backend):
    v, u, ref, x, prev = inputs(shape, dtype, backend)
    rows = shape[0]
    coef = coefficients("flow", rows, backend)
    g = torch.Generator().manual_seed(1)
    old = gk.sde_log_prob(wide(v), wide(x), wide(prev), coef, wide(u), 3.0).float()
    old += (torch.randn(rows, generator=g) * 0.01).to(old.device)
    advantage = (torch.randn(rows, generator=g) * 4).to(old.device)
    gate = (torch.rand(rows, generator=g) < 0.5).to(old.device)
    return v, u, ref, x, prev, old, advantage, gate, coef
