"""The recorded outputs of the official functions are reproduced.

Tolerances are those of the recordings, which are float32: means 1e-6 relative to the largest
element, log-probs and losses 2e-5, gradients 1e-5 relative to the largest element.
"""

from __future__ import annotations

import pytest
import torch

import gardo_kernels as gk


def relative(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("eta", [0.7, 0.9])
@pytest.mark.parametrize(("kind", "prefix"), [("flow", "sde"), ("cps", "cps")])
def test_steps(golden, kind, prefix, eta):
    sigmas = golden["sigmas"]
    table = gk.sde_coefficients(sigmas[:-1], sigmas[1:], eta, kind, sigma_max=sigmas[1])
    for i in range(10):
        velocity, sample, prev, mean, std, log_prob = (
            golden[f"{prefix}_{eta}/{name}"][i]
            for name in ("velocity", "sample", "prev_sample", "mean", "std", "log_prob")
        )
        step = gk.sde_step(velocity, sample, table[i], noise=torch.zeros_like(sample))
        assert relative(step.mean, mean) < 1e-6
        torch.testing.assert_close(table[i].std.expand(2), std, rtol=1e-6, atol=1e-7)
        actual = gk.sde_log_prob(velocity, sample, prev, table[i])
        torch.testing.assert_close(actual, log_prob, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("clip", ["0.0001", "0.01"])
def test_grpo_loss(golden, clip):
    inputs = {name.split("/")[1]: v for name, v in golden.items() if name.startswith("grpo/")}
    expected = {
        name.split("/")[2]: v for name, v in golden.items() if name.startswith(f"grpo/clip{clip}/")
    }
    sigmas, i = golden["sigmas"], int(inputs["step"])
    coef = gk.sde_coefficients(
        sigmas[i],
        sigmas[i + 1],
        round(float(inputs["noise_level"]), 6),
        sigma_max=sigmas[1],
        kl_scale="official",
    )
    velocity = inputs["velocity"].clone().requires_grad_()
    out = gk.grpo_loss(
        velocity,
        inputs["sample"],
        inputs["prev_sample"],
        inputs["old_log_prob"],
        inputs["advantage"],
        coef,
        clip_range=float(clip),
        gate=inputs["gate"],
        ref_velocity=inputs["ref_velocity"],
        kl_coef=float(inputs["kl_coef"]),
    )
    out.loss.backward()
    for name in ("loss", "policy_loss", "kl", "ratio"):
        torch.testing.assert_close(
            getattr(out, name).detach(), expected[name], rtol=2e-5, atol=0.0, msg=name
        )
    assert relative(velocity.grad, expected["grad"]) < 1e-5


def test_nft_loss(golden):
    inputs = {name.split("/")[1]: v for name, v in golden.items() if name.startswith("nft/")}
    velocity = inputs["velocity"].clone().requires_grad_()
    out = gk.nft_loss(
        velocity,
        inputs["old_velocity"],
        inputs["x0"],
        inputs["xt"],
        inputs["t"],
        inputs["advantage"],
        beta=float(inputs["beta"]),
        gate=inputs["gate"],
        ref_velocity=inputs["ref_velocity"],
        kl_coef=float(inputs["kl_coef"]),
    )
    out.loss.backward()
    for name in ("loss", "policy_loss", "kl"):
        torch.testing.assert_close(getattr(out, name).detach(), inputs[name], rtol=2e-5, atol=0.0)
    assert relative(velocity.grad, inputs["grad"]) < 1e-5


@pytest.mark.parametrize("norm", ["group_std", "global_std"])
def test_grpo_advantages(golden, norm):
    rewards, ids = golden["adv/rewards"], golden["adv/group_ids"]
    expected = golden["adv/grpo_globalstd1" if norm == "global_std" else "adv/grpo_globalstd0"]
    actual = gk.shape_rewards(rewards, rewards.new_empty(0, 48), ids, advantage_norm=norm)
    torch.testing.assert_close(actual.advantage, expected, rtol=0.0, atol=1e-9)


def test_gardo_advantages(golden):
    rewards, ids = golden["adv/rewards"], golden["adv/group_ids"]
    distance = gk.nearest_neighbor_distance(golden["adv/features"], ids)
    actual = gk.shape_rewards(rewards, rewards.new_empty(0, 48), ids, distance)
    # The recorded distances were computed in float32: no closer than its rounding.
    torch.testing.assert_close(actual.advantage, golden["adv/gardo_globalstd0"], rtol=0, atol=3e-7)
    torch.testing.assert_close(actual.advantage, golden["adv/gardo_globalstd1"], rtol=0, atol=3e-7)


@pytest.mark.parametrize("backend", ["reference", None])
def test_official_gate_over_40_epochs(golden, backend):
    controller = gk.AdaptiveFraction()
    ids = torch.zeros(48, dtype=torch.int64)
    for epoch in range(40):
        proxy, aux = golden["gate/proxy"][epoch], golden["gate/aux"][epoch]
        mean = gk.shape_rewards(proxy, aux, ids, gate="official", backend=backend).mean_uncertainty
        fraction = controller.update(mean)
        assert fraction == float(golden["gate/fraction"][epoch])
        shaped = gk.shape_rewards(
            proxy, aux, ids, fraction=fraction, gate="official", backend=backend
        )
        assert torch.equal(shaped.gate, golden["gate/mask"][epoch])
        assert torch.equal(shaped.uncertainty, golden["gate/rank_gap"][epoch].double())
        assert float(shaped.threshold) == pytest.approx(
            float(golden["gate/threshold"][epoch]), rel=1e-12
        )
