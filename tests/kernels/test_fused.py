"""The fused backends against the float64 reference.

Triton runs on a GPU, or under its interpreter, which must be asked for before Triton is imported:
`test_triton_under_the_interpreter` runs the tests of the fused kernels again in a process of their
own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fused_inputs import (
    BACKENDS,
    CASES,
    DEVICE,
    DTYPES,
    GRAD_TOLERANCE,
    KINDS,
    RUNS_TRITON,
    close,
    coefficients,
    device_of,
    grpo_inputs,
    inputs,
    wide,
)

import gardo_kernels as gk


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


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_rows_in_another_order(backend):
    """What belongs to a row moves with it, bit for bit; means over rows move by rounding."""
    v, u, ref, x, prev, old, advantage, gate, _ = grpo_inputs((7, 33), torch.float32, backend)
    coef = gk.sde_coefficients(0.6, 0.5).expand(7).to(v.device)
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4], device=v.device)

    def both(pick):
        a, b, c, d, e, f = (t[pick] for t in (v, u, ref, x, prev, old))
        a = a.clone().requires_grad_()
        options = {"gate": gate[pick], "ref_velocity": c, "kl_coef": 0.1, "backend": backend}
        grpo = gk.grpo_loss(a, d, e, f, advantage[pick], coef[pick], velocity_uncond=b,
                            guidance_scale=2.0, **options)  # fmt: skip
        nft = gk.nft_loss(a, b, d, e, f.sigmoid(), advantage[pick], **options)
        rows = (grpo.log_prob, grpo.ratio, *torch.autograd.grad(grpo.loss, a, retain_graph=True))
        return rows, (grpo.loss, grpo.kl, nft.loss, nft.kl, *torch.autograd.grad(nft.loss, a))

    (rows, means), (moved_rows, moved_means) = both(slice(None)), both(order)
    for a, b in zip(rows, moved_rows, strict=True):
        assert torch.equal(a[order], b)
    for a, b in zip(means, moved_means, strict=True):
        torch.testing.assert_close(a[order] if a.dim() else a, b, rtol=1e-6, atol=1e-6)
    ids = torch.tensor([1, 1, 0, 1, 0, 0, 2], device=v.device)
    distance = gk.nearest_neighbor_distance(x, ids, backend=backend)
    moved = gk.nearest_neighbor_distance(x[order], ids[order], backend=backend)
    torch.testing.assert_close(moved, distance[order], rtol=0, atol=1e-6)


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


FILES = ("test_fused.py", "test_operators.py", "test_loss_sums.py")


@pytest.mark.slow
@pytest.mark.skipif(RUNS_TRITON, reason="this process runs Triton itself")
def test_triton_under_the_interpreter():
    pytest.importorskip("triton", reason="triton is not installed")
    files = [str(Path(__file__).parent / name) for name in FILES]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "triton",
         *files],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
