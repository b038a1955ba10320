"""Rewards and features of an epoch to advantages and the gate; nearest neighbours by group size."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

import gardo_kernels as gk

from . import eager

GROUP, FEATURES, AUX, TIMESTEPS = 24, 1024, 2, 8


def epoch(samples, device):
    rng = np.random.default_rng(0)
    ids = rng.permutation(np.arange(samples) % (samples // GROUP))
    features = rng.normal(size=(samples, FEATURES)).astype(np.float32)
    rewards = rng.normal(size=(1 + AUX, samples))
    prompts = np.array([f"a photo of {i} red apples and a blue bench in a park" for i in ids])
    tensors = tuple(torch.tensor(a, device=device) for a in (features, rewards, ids))
    return (features, rewards, prompts), tensors


@pytest.mark.parametrize("samples", [1152, 9216])
@pytest.mark.parametrize("how", ["host numpy", "ours"])
def test_shape_rewards_and_distance(measure, device, samples, how):
    (f, r, prompts), (features, rewards, ids) = epoch(samples, device)

    def ours():
        distance = gk.nearest_neighbor_distance(features, ids)
        return gk.shape_rewards(rewards[0], rewards[1:], ids, distance, gate="official")

    proxy = np.repeat(r[0][:, np.newaxis], TIMESTEPS, axis=1)

    def theirs():
        return eager.shaping(f, proxy, r[1:], prompts)

    advantage, gate = theirs()
    shaped = ours()
    np.testing.assert_allclose(
        shaped.advantage.cpu().numpy(), advantage[:, 0], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(shaped.gate.cpu().numpy(), gate)
    least = features.numel() * 4 + rewards.numel() * 8
    run = ours if how == "ours" else theirs
    measure(run, f"shape_rewards + nearest_neighbor, N={samples}", how, least)


@pytest.mark.parametrize("samples", [1152, 9216])
def test_shape_rewards_alone(measure, device, samples):
    _, (_, rewards, ids) = epoch(samples, device)
    measure(
        lambda: gk.shape_rewards(rewards[0], rewards[1:], ids),
        f"shape_rewards, N={samples}",
        "ours",
        rewards.numel() * 8,
    )


@pytest.mark.parametrize("samples", [1152, 9216])
def test_group_advantages(measure, device, samples):
    _, (_, rewards, ids) = epoch(samples, device)
    measure(
        lambda: gk.group_advantages(rewards[0], ids, rewards[1].abs(), "group_std"),
        f"group_advantages, N={samples}",
        "ours",
        4 * samples * 8,
    )


@pytest.mark.parametrize("samples", [1152, 9216])
@pytest.mark.parametrize("scope", ["batch", "group"])
def test_gate_samples(measure, device, samples, scope):
    _, (_, rewards, ids) = epoch(samples, device)
    measure(
        lambda: gk.gate_samples(rewards[0], rewards[1:], ids, 0.1, scope=scope),
        f"gate_samples by {scope}, N={samples}",
        "ours",
        rewards.numel() * 8,
    )


# Comparing all pairs of 9216 takes the CPU seconds a call.
@pytest.mark.parametrize(("samples", "how"), [(1152, "eager"), (1152, "ours"), (9216, "ours")])
def test_win_rate(measure, device, samples, how):
    _, (_, rewards, _) = epoch(samples, device)
    torch.testing.assert_close(
        gk.win_rate(rewards).float(), eager.win_rate(rewards), rtol=0, atol=1e-6
    )
    run = {"eager": eager.win_rate, "ours": gk.win_rate}[how]
    measure(lambda: run(rewards), f"win_rate, N={samples}", how, 2 * rewards.numel() * 8)


@pytest.mark.parametrize("group", [24, 256, 2304])
@pytest.mark.parametrize("backend", ["native", "triton", "reference", "faiss"])
def test_nearest_neighbor_crossover(measure, device, group, backend):
    """The same 2304 samples in ever larger groups: which backend wins where."""
    if backend == "faiss" and importlib.util.find_spec("faiss") is None:
        pytest.skip("faiss is not installed")
    g = torch.Generator().manual_seed(0)
    features = torch.randn(2304, FEATURES, generator=g).to(device)
    ids = (torch.arange(2304) // group).to(device)
    try:
        actual = gk.nearest_neighbor_distance(features, ids, backend=backend)
    except gk.BackendUnavailable as error:
        pytest.skip(str(error))
    expected = gk.nearest_neighbor_distance(features, ids, backend="reference")
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    measure(
        lambda: gk.nearest_neighbor_distance(features, ids, backend=backend),
        f"nearest_neighbor_distance, groups of {group}",
        backend,
        features.numel() * 4,
    )
