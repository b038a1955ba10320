"""The GRPO loss against an independent numpy float64 form, and its guarantees."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import gardo_kernels as gk

COEF = gk.sde_coefficients(0.6, 0.5)
WIDE = gk.sde_coefficients(0.6, 0.5, dtype=torch.float64)


def batch(rng, rows=6, shape=(3, 2), dtype=torch.float32):
    v, x, p, ref, u = (
        torch.randn(rows, *shape, generator=rng, dtype=torch.float64) for _ in range(5)
    )
    a = torch.randn(rows, generator=rng, dtype=torch.float64) * 4
    old = gk.sde_log_prob(v + 0.01 * u, x, p, WIDE).double()
    return {
        "velocity": v.to(dtype),
        "sample": x.to(dtype),
        "prev_sample": p.to(dtype),
        "old_log_prob": old.to(dtype),
        "advantage": a.to(dtype),
        "ref_velocity": ref.to(dtype),
    }


def expected(b, coef, eps, gate, kl_coef, reduction, adv_clip=5.0, v=None):
    """Loss and gradient by velocity, written out with numpy."""
    n = {k: t.double().numpy() for k, t in b.items()}
    v = n["velocity"] if v is None else v
    a, bb, scale, offset, kl_w = (
        float(getattr(coef, f)) for f in ("a", "b", "scale", "offset", "kl")
    )
    axes = tuple(range(1, v.ndim))
    size = v[0].size
    residual = n["prev_sample"] - a * n["sample"] - bb * v
    log_prob = offset - scale * (residual**2).mean(axes)
    ratio = np.exp(log_prob - n["old_log_prob"])
    adv = np.clip(n["advantage"], -adv_clip, adv_clip)
    low, high = (eps, eps) if isinstance(eps, float) else eps
    plain, clipped = -adv * ratio, -adv * np.clip(ratio, 1 - low, 1 + high)
    policy = np.maximum(plain, clipped).mean()
    diff = v - n["ref_velocity"]
    weight = gate / (max(gate.sum(), 1) if reduction == "gated" else len(gate))
    kl = (weight * kl_w * (diff**2).mean(axes)).sum()
    column = (-1, *([1] * (v.ndim - 1)))
    d_log_prob = np.where(plain >= clipped, -adv * ratio, 0) / len(adv)
    grad = (d_log_prob * scale * 2 * bb / size).reshape(column) * residual
    grad = grad + kl_coef * (weight * kl_w * 2 / size).reshape(column) * diff
    return policy + kl_coef * kl, policy, kl, ratio, grad


@pytest.mark.parametrize("reduction", ["gated", "batch"])
@pytest.mark.parametrize("eps", [1e-4, 0.05, (0.2, 0.01)])
@pytest.mark.parametrize("gated", [[1, 0, 1, 0, 0, 1], [0] * 6, [1] * 6])
def test_loss_and_gradient(rng, reduction, eps, gated):
    b = batch(rng, dtype=torch.float64)
    gate = torch.tensor(gated, dtype=torch.bool)
    v = b["velocity"].requires_grad_()
    out = gk.grpo_loss(
        **b, coef=WIDE, clip_range=eps, gate=gate, kl_coef=0.3, kl_reduction=reduction
    )
    out.loss.backward()
    detached = {k: t.detach() for k, t in b.items()}
    loss, policy, kl, ratio, grad = expected(detached, WIDE, eps, gate.numpy(), 0.3, reduction)
    for actual, value in (
        (out.loss, loss),
        (out.policy_loss, policy),
        (out.kl, kl),
        (out.ratio, ratio),
        (v.grad, grad),
    ):
        np.testing.assert_allclose(actual.detach().numpy(), value, rtol=1e-10, atol=1e-13)
    low, high = (eps, eps) if isinstance(eps, float) else eps
    share = np.mean((ratio < 1 - low) | (ratio > 1 + high))
    assert float(out.clip_fraction) == pytest.approx(share)


def test_hand_computed():
    # One latent element, a = 1, b = -0.1, scale 2, offset 0: residual 0.2, log_prob -0.08.
    from gardo_kernels.ops.sde.coefficients import gaussian_coefficients

    one = torch.tensor(1.0, dtype=torch.float64)
    coef = gaussian_coefficients(one, -0.1 * one, 0.5 * one)
    v, x, p, ref = (torch.full((2, 1), t, dtype=torch.float64) for t in (1.0, 1.0, 1.1, 3.0))
    log_prob = -2 * 0.2**2 - math.log(0.5) - 0.5 * math.log(2 * math.pi)
    old = torch.tensor([log_prob, log_prob + 0.5], dtype=torch.float64)
    advantage = torch.tensor([10.0, -1.0], dtype=torch.float64)  # the first is clamped to 5
    out = gk.grpo_loss(
        v, x, p, old, advantage, coef, 0.2, ref_velocity=ref, kl_coef=0.5, kl_reduction="batch"
    )
    policy = (-5.0 + 0.8) / 2  # the second is clipped at 1 - 0.2 since exp(-0.5) < 0.8
    kl = 0.1**2 / (2 * 0.25) * 4
    assert float(out.policy_loss) == pytest.approx(policy, rel=1e-9)
    assert float(out.kl) == pytest.approx(kl, rel=1e-9)
    assert float(out.loss) == pytest.approx(policy + 0.5 * kl, rel=1e-9)
    assert float(out.clip_fraction) == 0.5


@pytest.mark.parametrize("kind", ["flow", "cps", "dance"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_policy_ratio_is_exactly_one(rng, kind, dtype):
    coef = gk.sde_coefficients(0.6, 0.5, kind=kind)
    v, u = (torch.randn(9, 16, 5, 5, generator=rng).to(dtype) for _ in range(2))
    x = torch.randn(9, 16, 5, 5, generator=rng)
    step = gk.sde_step(v, x, coef, seed=2, velocity_uncond=u, guidance_scale=4.5)
    for rows in (slice(0, 9), slice(2, 5), slice(4, 5)):  # any micro-batch of the rollout
        out = gk.grpo_loss(
            v[rows],
            x[rows],
            step.prev_sample[rows],
            step.log_prob[rows],
            torch.ones(9)[rows],
            coef,
            velocity_uncond=u[rows],
            guidance_scale=4.5,
        )
        assert (out.ratio == 1).all()
        assert float(out.clip_fraction) == 0


def test_guidance_gradient(rng):
    b = batch(rng, dtype=torch.float64)
    u = torch.randn(6, 3, 2, generator=rng, dtype=torch.float64).requires_grad_()
    v = b.pop("velocity").requires_grad_()
    gate = torch.tensor([1, 0, 0, 1, 0, 0], dtype=torch.bool)

    def loss(v, u):
        return gk.grpo_loss(
            v, coef=WIDE, clip_range=0.3, gate=gate, kl_coef=0.2, velocity_uncond=u,
            guidance_scale=3.0, backend="reference", **b,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, (v, u))
    gv, gu = torch.autograd.grad(loss(v, u), (v, u))
    torch.testing.assert_close(gu, gv * (1 - 3.0) / 3.0)


@pytest.mark.parametrize("poison", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("reduction", ["gated", "batch"])
def test_ungated_reference_rows_have_no_effect(rng, poison, reduction):
    b = batch(rng)
    gate = torch.tensor([1, 0, 1, 0, 0, 0], dtype=torch.bool)
    results = []
    for value in (None, poison):
        if value is not None:
            b["ref_velocity"][~gate] = value
        v = b["velocity"].clone().requires_grad_()
        out = gk.grpo_loss(
            **{**b, "velocity": v}, coef=COEF, gate=gate, kl_coef=0.1, kl_reduction=reduction
        )
        out.loss.backward()
        results.append((out.loss.detach(), out.kl, v.grad))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


def test_no_gated_row_is_the_plain_policy_loss(rng):
    b = batch(rng)
    b["ref_velocity"][:] = math.nan
    none = torch.zeros(6, dtype=torch.bool)
    v, w = b["velocity"].clone().requires_grad_(), b["velocity"].clone().requires_grad_()
    with_kl = gk.grpo_loss(**{**b, "velocity": v}, coef=COEF, gate=none, kl_coef=0.1)
    del b["ref_velocity"]
    without = gk.grpo_loss(**{**b, "velocity": w}, coef=COEF)
    with_kl.loss.backward()
    without.loss.backward()
    assert float(with_kl.kl) == 0
    assert torch.equal(with_kl.loss, without.loss)
    assert torch.equal(v.grad, w.grad)


def test_overflowing_ratio_without_advantage_or_clipped(rng):
    b = batch(rng)
    b["old_log_prob"][0] = -1000.0  # exp overflows
    b["advantage"][0] = 0.0
    b["old_log_prob"][1], b["advantage"][1] = -1000.0, 1.0  # clipped
    v = b["velocity"].clone().requires_grad_()
    out = gk.grpo_loss(**{**b, "velocity": v}, coef=COEF)
    out.loss.backward()
    assert out.ratio[0].isinf()
    assert out.loss.isfinite()
    assert (v.grad[:2] == 0).all()
    assert v.grad[2:].isfinite().all()


def test_only_the_loss_and_only_the_velocities_carry_gradients(rng):
    b = {k: t.requires_grad_() for k, t in batch(rng).items()}
    out = gk.grpo_loss(**b, coef=COEF, kl_coef=0.1)
    assert out.loss.requires_grad
    assert not any(t.requires_grad for t in out[1:])
    out.loss.backward()
    assert b["velocity"].grad is not None
    assert all(t.grad is None for k, t in b.items() if k != "velocity")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_velocities_get_gradients_of_their_dtype(rng, dtype):
    b = batch(rng)
    half = b["velocity"].to(dtype)
    v, w = half.clone().requires_grad_(), half.float().requires_grad_()
    out = gk.grpo_loss(**{**b, "velocity": v}, coef=COEF, kl_coef=0.1)
    wide = gk.grpo_loss(**{**b, "velocity": w}, coef=COEF, kl_coef=0.1)
    (out.loss * 1000).backward()
    (wide.loss * 1000).backward()
    assert out.loss.dtype == torch.float32
    assert torch.equal(out.loss, wide.loss)
    assert v.grad.dtype == dtype
    assert torch.equal(v.grad, w.grad.to(dtype))


def test_empty_batch_has_loss_zero():
    empty = torch.empty(0, 4, requires_grad=True)
    rows = torch.empty(0)
    out = gk.grpo_loss(empty, empty, empty, rows, rows, COEF, ref_velocity=empty, kl_coef=0.1)
    out.loss.backward()
    assert [float(t.detach()) for t in (out.loss, out.kl, out.clip_fraction)] == [0, 0, 0]
    assert empty.grad.shape == (0, 4)


X, R = torch.zeros(2, 3), torch.zeros(2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"old_log_prob": torch.zeros(3)}, ValueError, r"old_log_prob: expected shape \[2\]"),
        ({"old_log_prob": None}, TypeError, "old_log_prob: expected a torch.Tensor, got NoneType"),
        ({"advantage": torch.zeros(2, 1)}, ValueError, r"advantage: expected shape \[2\]"),
        ({"advantage": torch.zeros(2).long()}, TypeError, "advantage: expected dtype"),
        ({"gate": torch.zeros(2)}, TypeError, "gate: expected dtype torch.bool"),
        ({"gate": torch.zeros(3, dtype=torch.bool)}, ValueError, "gate: expected shape"),
        ({"kl_coef": 0.1}, ValueError, "ref_velocity: expected a tensor for kl_coef 0.1, got None"),
        ({"kl_coef": -0.1}, ValueError, "kl_coef"),
        ({"ref_velocity": X[:, :2]}, ValueError, r"ref_velocity: expected shape \[2, 3\]"),
        ({"clip_range": -0.1}, ValueError, "clip_range"),
        ({"clip_range": (0.1, 0.2, 0.3)}, ValueError, "clip_range: .* got 3 values"),
        ({"clip_range": "x"}, TypeError, "clip_range: expected a number, got str"),
        ({"clip_range": math.nan}, ValueError, "clip_range"),
        ({"adv_clip": 0.0}, ValueError, "adv_clip"),
        ({"kl_reduction": "mean"}, ValueError, "kl_reduction: expected one of gated, batch"),
        ({"backend": "numpy"}, ValueError, "backend"),
        ({"coef": gk.sde_coefficients(0.5, 0.4, kind="ode")}, ValueError, "kind 'ode'"),
        ({"prev_sample": X.to("meta")}, ValueError, "prev_sample: expected device cpu, got meta"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {
        "velocity": X, "sample": X, "prev_sample": X, "old_log_prob": R, "advantage": R,
        "coef": COEF, **change,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        gk.grpo_loss(**arguments)
