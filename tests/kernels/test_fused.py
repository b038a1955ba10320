"""The fused backends against the float64 reference, and what PyTorch expects of an operator.

Triton runs on a GPU, or under its interpreter, which must be asked for before Triton is imported:
`test_triton_under_the_interpreter` runs this file again in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import gardo_kernels as gk
from gardo_kernels import _native

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
RUNS_TRITON = INTERPRETED or DEVICE == "cuda"
BACKENDS = [
    pytest.param(
        "native",
        marks=pytest.mark.skipif(
            not _native.is_available(), reason=str(_native.unavailable_reason())
        ),
    ),
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(
            not RUNS_TRITON, reason="no GPU: run by test_triton_under_the_interpreter"
        ),
    ),
]
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "dtype"), CASES)
@pytest.mark.parametrize("guided", [False, True])
def test_step_and_log_prob(backend, kind, dtype, shape, guided):
    v, u, z, x, _ = inputs(shape, dtype, backend)
    coef = coefficients(kind, shape[0], backend)
    guidance = {"velocity_uncond": u, "guidance_scale": 4.5} if guided else {}
    exact = {k: wide(t) for k, t in guidance.items()}
    step = gk.sde_step(v, x, coef, noise=z, **guidance, backend=backend)
    expected = gk.sde_step(wide(v), wide(x), coef, noise=wide(z), **exact)
    assert {t.dtype for t in step} == {torch.float32}
    close(step.mean, expected.mean)
    close(step.prev_sample, expected.prev_sample)
    close(step.log_prob, expected.log_prob, 1e-5)
    # The stored sample gives the same bits, for any part of the batch.
    for rows in (slice(0, shape[0]), slice(max(shape[0] - 1, 0), shape[0])):
        some = coef if coef.a.dim() == 0 else coef[rows]
        part = {k: t[rows] if k == "velocity_uncond" else t for k, t in guidance.items()}
        again = gk.sde_log_prob(
            v[rows], x[rows], step.prev_sample[rows], some, **part, backend=backend
        )
        assert torch.equal(again, step.log_prob[rows])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(3, 1), (2, 3, 5), (2, 4101)])
def test_seeded_noise_is_that_of_the_reference(backend, shape):
    device = device_of(backend)
    zero = torch.zeros(shape, device=device)
    coef = gk.sde_coefficients(0.6, 0.5).to(device)
    for seed in (0, 7, -3, 2**40 + 11):
        drawn = gk.sde_step(zero, zero, coef, seed=seed, backend=backend).prev_sample
        expected = gk.sde_step(zero, zero, coef, seed=seed, backend="reference").prev_sample
        torch.testing.assert_close(drawn, expected, rtol=1e-5, atol=1e-6)
        tensor = torch.tensor([seed], device=device)
        assert torch.equal(
            gk.sde_step(zero, zero, coef, seed=tensor, backend=backend).prev_sample, drawn
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_ode_step(backend):
    v, _, _, x, _ = inputs((2, 5), torch.float32, backend)
    coef = gk.sde_coefficients(0.6, 0.5, kind="ode").to(device_of(backend))
    step = gk.sde_step(v, x, coef, seed=1, backend=backend)
    close(step.prev_sample, wide(x) + wide(coef.b) * wide(v))
    assert step.log_prob.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1), (1, 7), (4, 3, 5), (2, 9001)])
def test_log_prob_gradient(backend, dtype, shape):
    v, u, _, x, prev = inputs(shape, dtype, backend)
    coef = coefficients("flow", shape[0], backend)
    upstream = torch.linspace(-800, 900, shape[0], device=v.device)
    grads = []
    for name, cast in ((backend, lambda t: t), ("reference", wide)):
        a, b = cast(v).clone().requires_grad_(), cast(u).clone().requires_grad_()
        lp = gk.sde_log_prob(a, cast(x), cast(prev), coef, b, 3.0, backend=name)
        lp.backward(upstream.to(lp.dtype))
        grads.append((a.grad, b.grad))
    for actual, expected in zip(*grads, strict=True):
        assert actual.dtype == dtype
        close(actual, expected, GRAD_TOLERANCE[dtype])


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shape", "dtype"), [*CASES, ((37, 6), torch.float32)])
@pytest.mark.parametrize("kl", ["none", "gated", "batch", "ungated", "all"])
def test_grpo_loss(backend, dtype, shape, kl):
    v, u, ref, x, prev, old, advantage, gate, coef = grpo_inputs(shape, dtype, backend)
    options = {"clip_range": (0.003, 0.005), "guidance_scale": 3.0}
    if kl != "none":
        options |= {"kl_coef": 0.3, "kl_reduction": "batch" if kl == "batch" else "gated"}
    if kl == "ungated":
        gate = torch.zeros_like(gate)
    results = []
    for name, cast in ((backend, lambda t: t), ("reference", wide)):
        a, b = cast(v).clone().requires_grad_(), cast(u).clone().requires_grad_()
        out = gk.grpo_loss(
            a, cast(x), cast(prev), cast(old), cast(advantage), coef, velocity_uncond=b,
            gate=None if kl == "all" else gate, ref_velocity=None if kl == "none" else cast(ref),
            **options, backend=name,
        )  # fmt: skip
        (out.loss * 1000).backward()
        results.append((out, a.grad, b.grad))
    (out, *grads), (expected, *expected_grads) = results
    close(out.log_prob, expected.log_prob, 1e-5)
    close(out.ratio, expected.ratio, 1e-5)
    # Advantages of both signs cancel: the scale is that of the terms.
    terms = float(advantage.abs().max()) if shape[0] else 0.0
    close(out.policy_loss, expected.policy_loss, 1e-5, terms)
    close(out.loss, expected.loss, 1e-5, terms)
    close(out.kl, expected.kl, 1e-5)
    close(out.clip_fraction, expected.clip_fraction)
    for actual, value in zip(grads, expected_grads, strict=True):
        assert actual.dtype == dtype
        close(actual, value, max(1e-5, GRAD_TOLERANCE[dtype]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 3, 3), (3, 4501)])
def test_on_policy_ratio_is_exactly_one(backend, kind, dtype, shape):
    v, u, _, x, _ = inputs(shape, dtype, backend)
    coef = coefficients(kind, 1, backend)
    step = gk.sde_step(v, x, coef, seed=3, velocity_uncond=u, guidance_scale=4.5, backend=backend)
    for rows in (slice(0, shape[0]), slice(1, 3), slice(2, 3)):
        out = gk.grpo_loss(
            v[rows], x[rows], step.prev_sample[rows], step.log_prob[rows],
            torch.ones_like(step.log_prob[rows]), coef, velocity_uncond=u[rows],
            guidance_scale=4.5, backend=backend,
        )  # fmt: skip
        assert (out.ratio == 1).all()
        assert float(out.clip_fraction) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_grpo_poison_stays_where_it_is(backend):
    v, u, ref, x, prev, old, advantage, _, coef = grpo_inputs((6, 300), torch.float32, backend)
    gate = torch.tensor([1, 0, 1, 0, 0, 0], dtype=torch.bool, device=v.device)
    advantage[1], advantage[2] = 0.0, 1.0
    results = []
    for value in (0.0, float("nan")):
        ref[~gate] = value
        old[1] = -1000.0  # its ratio overflows and it has no advantage
        old[2] = -1000.0  # its ratio overflows and it is clipped
        a = v.clone().requires_grad_()
        out = gk.grpo_loss(
            a, x, prev, old, advantage, coef, gate=gate, ref_velocity=ref, kl_coef=0.1,
            velocity_uncond=u, guidance_scale=3.0, backend=backend,
        )  # fmt: skip
        out.loss.backward()
        results.append((out.loss.detach(), out.policy_loss, out.kl, a.grad))
    for clean, poisoned in zip(*results, strict=True):
        assert clean.isfinite().all()
        assert torch.equal(clean, poisoned)
    assert (a.grad[1] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shape", "dtype"), [*CASES, ((37, 6), torch.float32)])
@pytest.mark.parametrize("kl", ["none", "gated", "ungated", "ungated_all"])
def test_nft_loss(backend, dtype, shape, kl):
    v, old, ref, x0, noise = inputs(shape, dtype, backend)
    g = torch.Generator().manual_seed(2)
    rows = shape[0]
    t = torch.rand(rows, generator=g).to(v.device)
    column = t.view(-1, *([1] * (len(shape) - 1)))
    xt = (1 - column) * x0 + column * noise
    advantage = (torch.randn(rows, generator=g) * 6).to(v.device)
    gate = (torch.rand(rows, generator=g) < 0.5).to(v.device) & (not kl.startswith("ungated"))
    results = []
    for name, cast in ((backend, lambda s: s), ("reference", wide)):
        a = cast(v).clone().requires_grad_()
        out = gk.nft_loss(
            a, cast(old), cast(x0), cast(xt), cast(t), cast(advantage), 0.5, 4.0, gate=gate,
            ref_velocity=None if kl == "none" else cast(ref), kl_coef=0.0 if kl == "none" else 0.3,
            kl_when_ungated="all" if kl == "ungated_all" else "none", backend=name,
        )  # fmt: skip
        (out.loss * 1000).backward()
        results.append((*out, a.grad))
    *values, grad = results[0]
    *expected, expected_grad = results[1]
    for actual, value in zip(values, expected, strict=True):
        close(actual, value, 1e-5)
    assert grad.dtype == dtype
    close(grad, expected_grad, max(1e-5, GRAD_TOLERANCE[dtype]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dimension", [1, 5, 64, 200])
def test_nearest_neighbor_distance(backend, dtype, dimension):
    g = torch.Generator().manual_seed(0)
    sizes = [1, 2, 24, 33, 70, 3]
    ids = torch.cat([torch.full((n,), 5 - 7 * i) for i, n in enumerate(sizes)])
    order = torch.randperm(len(ids), generator=g)
    features = (torch.randn(len(ids), dimension, generator=g) * 3).to(dtype)
    features[10] = features[9] * 2  # same direction, same group
    features[40] = 0.0
    features[50, 0] = float("nan")
    features, ids = features[order].to(device_of(backend)), ids[order].to(device_of(backend))
    actual = gk.nearest_neighbor_distance(features, ids, backend=backend)
    expected = gk.nearest_neighbor_distance(features, ids, backend="reference")
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6, equal_nan=True)
    one_column = features.repeat_interleave(2, dim=1)[:, ::2]
    again = gk.nearest_neighbor_distance(one_column, ids, backend=backend)
    torch.testing.assert_close(again, actual, rtol=0, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_views(backend):
    """Trajectory slices, transposed and expanded latents give the bits of their copies."""
    device = device_of(backend)
    g = torch.Generator().manual_seed(0)
    trajectory = torch.randn(5, 4, 3, 6, generator=g).to(device)
    wide_v = torch.randn(5, 6, 3, generator=g).to(device)
    coef = gk.sde_coefficients(0.6, 0.5).to(device)
    views = (wide_v.transpose(1, 2), trajectory[:, 1], trajectory[:, 2])
    for v, x, z in (views, (trajectory[:1, 0].expand(5, 3, 6), *views[1:])):
        step = gk.sde_step(v, x, coef, noise=z, backend=backend)
        plain = gk.sde_step(
            v.contiguous(), x.contiguous(), coef, noise=z.contiguous(), backend=backend
        )
        for a, b in zip(step, plain, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(
            gk.sde_log_prob(v, x, step.prev_sample, coef, backend=backend), step.log_prob
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_pass_two_to_the_31(backend):
    """Rows that lie 2^31 elements apart; the memory between them is never touched."""
    if DEVICE == "cuda" and backend == "triton" and torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    device = device_of(backend)
    far = torch.empty(2**31 + 64, dtype=torch.float16, device=device).as_strided(
        (2, 8, 8), (2**31, 8, 1)
    )
    near = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0)).half().to(device)
    far.copy_(near)
    coef = gk.sde_coefficients(0.6, 0.5).to(device)
    for a, b in zip(
        gk.sde_step(far, far, coef, noise=far, backend=backend),
        gk.sde_step(near, near, coef, noise=near, backend=backend),
        strict=True,
    ):
        assert torch.equal(a, b)


def op_samples(backend):
    """Arguments of every operator, as the public functions pass them."""
    v, u, ref, x, prev, old, advantage, gate, coef = grpo_inputs((4, 6), torch.float32, backend)
    c, device = coef, v.device
    a, b = v.clone().requires_grad_(), u.clone().requires_grad_()
    seed = torch.tensor([3], device=device)
    alpha = torch.ones(4, device=device)
    t = torch.rand(4, device=device)
    affine = (c.a, c.b)
    density = (c.scale, c.offset)
    ids = torch.tensor([0, 0, 1, 1], device=device)
    return {
        "sde_step": (v, x, *affine, c.c, *density, None, seed, u, 3.0, backend),
        "sde_log_prob": (a, x, prev, *affine, *density, b, 3.0, backend),
        "velocity_grad": (alpha[0], v, x, prev, *affine, alpha, alpha, ref, u, 3.0, backend),
        "grpo_loss": (
            a, x, prev, old, advantage, *affine, *density, c.kl, 0.1, 0.1, 5.0, gate, ref, 0.1,
            "gated", b, 3.0, backend,
        ),
        "nft_loss": (a, u, x, prev, t, advantage, 0.5, 5.0, gate, ref, 0.1, backend),
        "nft_grad": (alpha[0], v, u, x, prev, t, torch.ones(3, 4, device=device), 0.5, ref,
                     backend),
        "nearest_neighbor_distance": (v, ids, backend),
    }  # fmt: skip


OPS = [
    "sde_step", "sde_log_prob", "velocity_grad", "grpo_loss", "nft_loss", "nft_grad",
    "nearest_neighbor_distance",
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_opcheck(backend, name):
    torch.library.opcheck(getattr(torch.ops.gardo, name).default, op_samples(backend)[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(backend):
    v, u, ref, x, _, _, advantage, gate, coef = grpo_inputs((4, 6), torch.float32, backend)

    def train(v, u):
        step = gk.sde_step(
            v, x, coef, seed=3, velocity_uncond=u, guidance_scale=3.0, backend=backend
        )
        grpo = gk.grpo_loss(
            v, x, step.prev_sample, step.log_prob, advantage, coef, gate=gate, ref_velocity=ref,
            kl_coef=0.1, velocity_uncond=u, guidance_scale=3.0, backend=backend,
        )  # fmt: skip
        nft = gk.nft_loss(v, u, x, step.prev_sample, advantage.abs() / 100, advantage,
                          gate=gate, ref_velocity=ref, kl_coef=0.1, backend=backend)  # fmt: skip
        lp = gk.sde_log_prob(v, x, step.prev_sample, coef, u, 3.0, backend=backend)
        return grpo.loss + nft.loss + lp.sum(), grpo.ratio

    torch._dynamo.reset()
    compiled = torch.compile(train, fullgraph=True, backend="aot_eager")
    results = []
    for function in (train, compiled):
        a, b = v.clone().requires_grad_(), u.clone().requires_grad_()
        loss, ratio = function(a, b)
        loss.backward()
        assert (ratio == 1).all()
        results.append((loss.detach(), a.grad, b.grad))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", ["reference", BACKENDS[0]])
def test_shaping_is_an_operator(backend):
    g = torch.Generator().manual_seed(0)
    proxy, aux, features = (torch.randn(*s, generator=g) for s in ((12,), (2, 12), (12, 5)))
    ids = torch.arange(12) % 3
    ops = torch.ops.gardo
    arguments = (proxy.double(), aux.double(), ids, None, 0.1, None, "none", "paper", "batch")
    torch.library.opcheck(ops.shape_rewards.default, (*arguments, backend))
    torch.library.opcheck(ops.nearest_neighbor_distance.default, (features, ids, backend))

    def shape(proxy, features):
        distance = gk.nearest_neighbor_distance(features, ids, backend=backend)
        return gk.shape_rewards(proxy, aux, ids, distance, backend=backend), gk.win_rate(aux, ids)

    torch._dynamo.reset()
    compiled = torch.compile(shape, fullgraph=True, backend="aot_eager")
    (traced, wins), (eager, expected) = compiled(proxy, features), shape(proxy, features)
    torch.testing.assert_close(wins, expected)
    for a, b in zip(traced, eager, strict=True):
        torch.testing.assert_close(a, b)


def test_reference_compiles_without_graph_breaks():
    v, _, ref, x, prev, old, advantage, gate, coef = grpo_inputs((4, 6), torch.float32, "native")

    def loss(v):
        return gk.grpo_loss(
            v, x, prev, old, advantage, coef, gate=gate, ref_velocity=ref, kl_coef=0.1,
            backend="reference",
        ).loss  # fmt: skip

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(v), loss(v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_inputs_are_refused_not_rounded(backend):
    x = torch.zeros(2, 3, dtype=torch.float64, device=device_of(backend))
    coef = gk.sde_coefficients(0.6, 0.5).to(x.device)
    with pytest.raises(gk.BackendUnavailable, match="got float64 inputs"):
        gk.sde_step(x, x, coef, seed=1, backend=backend)
    assert gk.sde_step(x, x, coef, seed=1).mean.dtype == torch.float64


@pytest.mark.skipif(RUNS_TRITON, reason="this process runs Triton itself")
def test_triton_is_refused_with_the_reason():
    x, coef = torch.zeros(2, 3), gk.sde_coefficients(0.6, 0.5)
    with pytest.raises(gk.BackendUnavailable, match="TRITON_INTERPRET=1"):
        gk.sde_step(x, x, coef, seed=1, backend="triton")


@pytest.mark.slow
@pytest.mark.skipif(RUNS_TRITON, reason="this process runs Triton itself")
def test_triton_under_the_interpreter():
    pytest.importorskip("triton", reason="triton is not installed")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "triton",
         __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
