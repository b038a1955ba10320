"""The DiffusionNFT loss against an independent numpy float64 form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import gardo_kernels as gk

NAMES = ("velocity", "old_velocity", "x0", "noise", "ref_velocity")


def batch(rng, rows=5, shape=(2, 3), dtype=torch.float64):
    b = {k: torch.randn(rows, *shape, generator=rng, dtype=torch.float64) for k in NAMES}
    t = torch.rand(rows, generator=rng, dtype=torch.float64)
    column = t.view(-1, *([1] * len(shape)))
    b["xt"] = (1 - column) * b["x0"] + column * b.pop("noise")
    b["t"] = t
    b["advantage"] = torch.tensor([-20.0, -1.0, 0.0, 2.0, 20.0], dtype=torch.float64)[:rows]
    return {k: v.to(dtype) for k, v in b.items()}


def expected(b, beta, adv_clip, gate, kl_coef):
    n = {k: t.detach().double().numpy() for k, t in b.items()}
    axes = tuple(range(1, n["x0"].ndim))
    t = n["t"].reshape(-1, *([1] * len(axes)))
    r = np.clip(n["advantage"] / (2 * adv_clip) + 0.5, 0, 1)
    losses = []
    for sign in (1, -1):
        v = n["old_velocity"] + sign * beta * (n["velocity"] - n["old_velocity"])
        error = n["xt"] - t * v - n["x0"]
        weight = np.maximum(np.abs(error).mean(axes, keepdims=True), 1e-5)
        losses.append((error**2 / weight).mean(axes))
    policy = (adv_clip * (r * losses[0] + (1 - r) * losses[1]) / beta).mean()
    square = ((n["velocity"] - n["ref_velocity"]) ** 2).mean(axes)
    kl = square[gate].mean() if gate.any() else 0.0
    return policy + kl_coef * kl, policy, kl


@pytest.mark.parametrize("beta", [1.0, 0.1])
@pytest.mark.parametrize("gated", [[1, 0, 0, 1, 0], [0] * 5, [1] * 5])
def test_loss(rng, beta, gated):
    b = batch(rng)
    gate = torch.tensor(gated, dtype=torch.bool)
    out = gk.nft_loss(**b, beta=beta, adv_clip=4.0, gate=gate, kl_coef=0.3)
    for actual, value in zip(out, expected(b, beta, 4.0, gate.numpy(), 0.3), strict=True):
        np.testing.assert_allclose(actual.numpy(), value, rtol=1e-11)


def test_gradient(rng):
    b = batch(rng)
    v = b.pop("velocity").requires_grad_()
    gate = torch.tensor([1, 0, 0, 1, 0], dtype=torch.bool)
    # The weight is a constant of the loss: check against the loss with the weight frozen.
    n = {k: t.numpy() for k, t in b.items()}
    t = n["t"].reshape(-1, 1, 1)
    v0 = v.detach().numpy()
    grad = np.zeros_like(v0)
    r = np.clip(n["advantage"] / 10 + 0.5, 0, 1).reshape(-1, 1, 1)
    for sign, share in ((1, r), (-1, 1 - r)):
        error = n["xt"] - t * (n["old_velocity"] + sign * 0.5 * (v0 - n["old_velocity"])) - n["x0"]
        weight = np.maximum(np.abs(error).mean((1, 2), keepdims=True), 1e-5)
        grad += 5 * share / 0.5 * (2 / 6) * error / weight * (-t * sign * 0.5) / 5
    grad += 0.3 * gate.numpy().reshape(-1, 1, 1) * (2 / 6) * (v0 - n["ref_velocity"]) / 2
    out = gk.nft_loss(v, **b, beta=0.5, gate=gate, kl_coef=0.3)
    out.loss.backward()
    np.testing.assert_allclose(v.grad.numpy(), grad, rtol=1e-10, atol=1e-14)
    assert not out.policy_loss.requires_grad
    assert not out.kl.requires_grad


def test_hand_computed():
    # t = 1, x0 = 0, xt = 0: the prediction is -v. v = 3, v_old = 1, beta = 1: v+ = 3, v- = -1.
    one = torch.ones(1, 1, dtype=torch.float64)
    zero, t = torch.zeros_like(one), torch.ones(1, dtype=torch.float64)
    out = gk.nft_loss(3 * one, one, zero, zero, t, torch.tensor([2.5]).double())
    # r = 0.75; l+ = 9/3, l- = 1/1
    assert float(out.loss) == pytest.approx(5 * (0.75 * 3 + 0.25 * 1))


@pytest.mark.parametrize("gated", [[0, 0, 0, 0, 0], [0, 1, 0, 0, 0]])
def test_kl_when_ungated(rng, gated):
    b = batch(rng)
    gate = torch.tensor(gated, dtype=torch.bool)
    rows = gate if gate.any() else ~gate
    square = (b["velocity"] - b["ref_velocity"]).square().mean((1, 2))
    out = gk.nft_loss(**b, gate=gate, kl_coef=0.3, kl_when_ungated="all")
    assert float(out.kl) == pytest.approx(float(square[rows].mean()))


def test_poisoned_reference_rows_have_no_effect(rng):
    b = batch(rng)
    gate = torch.tensor([0, 1, 0, 0, 0], dtype=torch.bool)
    clean = gk.nft_loss(**b, gate=gate, kl_coef=0.3)
    b["ref_velocity"][~gate] = math.nan
    v = b.pop("velocity").requires_grad_()
    out = gk.nft_loss(v, **b, gate=gate, kl_coef=0.3)
    out.loss.backward()
    assert torch.equal(out.loss.detach(), clean.loss)
    assert v.grad.isfinite().all()


def test_perfect_prediction_is_finite():
    zero = torch.zeros(2, 3, requires_grad=True)
    still = torch.zeros(2, 3)
    out = gk.nft_loss(zero, still, still, still, torch.full((2,), 0.5), torch.ones(2))
    out.loss.backward()
    assert float(out.loss.detach()) == 0
    assert zero.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(rng, dtype):
    b = batch(rng, dtype=dtype)
    v = b.pop("velocity").requires_grad_()
    out = gk.nft_loss(v, **b, kl_coef=0.1)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert v.grad.dtype == dtype
    wide = expected({**b, "velocity": v}, 1.0, 5.0, np.ones(5, bool), 0.1)
    np.testing.assert_allclose([float(t.detach()) for t in out], wide, rtol=1e-5)


def test_scalar_time_and_empty_batch(rng):
    b = batch(rng)
    b["t"] = torch.full((5,), 0.3, dtype=torch.float64)
    rows = gk.nft_loss(**b).loss
    b["t"] = torch.tensor(0.3, dtype=torch.float64)
    assert torch.equal(gk.nft_loss(**b).loss, rows)
    empty = {k: t[:0] if t.dim() else t for k, t in b.items()}
    assert float(gk.nft_loss(**empty, kl_coef=0.1).loss) == 0


X, R = torch.zeros(2, 3), torch.zeros(2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"old_velocity": X[:, :1]}, ValueError, r"old_velocity: expected shape \[2, 3\]"),
        ({"x0": X.int()}, TypeError, "x0: expected dtype"),
        ({"t": torch.zeros(2, 1)}, ValueError, r"t: expected shape \[2\]"),
        ({"advantage": torch.zeros(1)}, ValueError, "advantage: expected shape"),
        ({"beta": 0.0}, ValueError, "beta"),
        ({"adv_clip": -1}, ValueError, "adv_clip"),
        ({"kl_coef": 0.1}, ValueError, "ref_velocity"),
        ({"kl_when_ungated": "some"}, ValueError, "kl_when_ungated"),
        ({"gate": torch.zeros(2)}, TypeError, "gate"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {
        "velocity": X, "old_velocity": X, "x0": X, "xt": X, "t": R, "advantage": R, **change,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        gk.nft_loss(**arguments)
