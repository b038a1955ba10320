"""The KL's share of the gradient: measured without changing anything, and held where asked."""

from __future__ import annotations

import math

import pytest
import torch

import gardo.trainer
from experiments.mixture.methods import _method, find_part
from experiments.mixture.policy import pretrain
from experiments.mixture.training import Run, Settings
from gardo.algorithms import grpo
from gardo.algorithms.gradient_share import measure_strength
from gardo.algorithms.strength import KLStrength
from gardo.config import AlgorithmConfig
from gardo.models.adapters import REFERENCE
from tests.gardo.test_training import comparable
from tests.support.everything import train_small

NFT = {"algorithm.name": "nft", "sampling.same_latent": "false"}
CASES = {
    "grpo": {},
    "guided": {"sampling.guidance_scale": 2.0},
    "nft": NFT,
}
STATIC = {
    "algorithm.gate.share_of": "all",
    "algorithm.gate.adaptive": "false",
    "algorithm.gate.fraction": 0.4,
    "algorithm.kl_coef": 0.5,
    "algorithm.reference.reset_every": 0,
    "algorithm.reference.kl_threshold": 0,
}


def mean_square(values):
    return values.square().flatten(1).mean(1)


def share(algorithm, data, k):
    """Of the first update's samples: as the formulas of docs/method.md are written."""
    rollout, config, step = data.rollout, algorithm.algorithm, data.steps[k]
    rows = torch.arange(rollout.plan.update_sizes[0])
    advantage = data.shaped.advantage[rows].clamp(-config.adv_clip, config.adv_clip)
    gate = data.shaped.gate[rows]
    assert 0 < int(gate.sum()) < len(rows)
    prompts, x = [rollout.prompts[i] for i in rows], data.at(k, rows)
    if config.name == "grpo":
        told = rollout.table.timesteps[step].expand(len(rows))
    else:
        told = data.timesteps[k, rows]
    velocity = algorithm.sampler.velocity(x.latents, told, prompts).guided
    with torch.no_grad(), algorithm.adapters.use(REFERENCE):
        reference = algorithm.sampler.velocity(x.latents, told, prompts).guided
    if config.name == "grpo":
        c = rollout.table.coefficients[step]
        log_prob = -mean_square(x.next_latents - c.a * x.latents - c.b * velocity) / (2 * c.c**2)
        policy = -(advantage * (log_prob - log_prob.detach()).exp()).sum()
        scale = c.b**2 / (2 * c.c**2)
    else:
        t = x.t.view(-1, 1, 1, 1)
        behaviour, beta, likes = x.behaviour_velocity, config.nft.beta, advantage / 10 + 0.5
        policy = torch.zeros(())
        for sign, weight in ((1, likes), (-1, 1 - likes)):
            implicit = behaviour + sign * beta * (velocity - behaviour)
            error = x.latents - t * implicit - x.clean_latents
            size = error.detach().abs().flatten(1).mean(1)
            policy = policy + config.adv_clip / beta * (weight * mean_square(error) / size).sum()
        scale = 1.0
    # the mean over the gated weighs as the mean over the update
    kl = scale * mean_square(velocity - reference)[gate].sum() * len(rows) / gate.sum()
    norms = []
    for loss in (policy, kl):
        found = torch.autograd.grad(loss, algorithm.parameters, retain_graph=True)
        norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in found)))
    return config.kl_coef * norms[1] / norms[0]


@pytest.mark.parametrize("name", CASES)
def test_the_share_is_that_of_the_gradients_and_nothing_else_changes(tmp_path, monkeypatch, name):
    expected, counts = [], []

    def checked(algorithm, data, epoch, moved):
        before = algorithm.sampler.model.rows
        expected.append(share(algorithm, data, epoch % len(data.steps)))
        counts.append(data.shaped.gated_per_update[0])
        algorithm.sampler.model.rows = before
        algorithm.sampler.model.transformer.zero_grad()
        found = measure_strength(algorithm, data, epoch, moved)
        assert algorithm.sampler.model.rows == before
        assert all(p.grad is None for p in algorithm.parameters)
        return found

    steps = {"sampling.num_steps": 3, "train.timestep_fraction": 0.7}  # of which 2 are trained
    settings = {**STATIC, **steps, **CASES[name]}
    monkeypatch.setattr(gardo.trainer, "measure_strength", checked)
    measured, weights = train_small(tmp_path / "measured", **settings)
    monkeypatch.setattr(gardo.trainer, "measure_strength", lambda *_: {})
    plain, plain_weights = train_small(tmp_path / "plain", **settings)

    assert all(torch.equal(value, plain_weights[key]) for key, value in weights.items())
    per_row = 2 if name == "guided" else 1
    for epoch, (row, without) in enumerate(zip(measured, plain, strict=True)):
        found, probed = row.pop("kl/gradient_share"), row.pop("forwards/probe")
        assert comparable(row) == comparable(without)
        if epoch == 0:  # the policy is the reference
            assert found == 0.0
        else:
            assert found == pytest.approx(expected[epoch], rel=1e-4)
            assert found > 1e-4
        # the first update's 6 samples for the policy's, the gated ones of them for the KL's
        gated = 0 if epoch == 0 else counts[epoch]
        assert probed == (6 + gated) * per_row
        # 12 samples at 3 steps of the rollout, at 2 of the updates and of the behaviour policy
        assert row["forwards/policy"] == 12 * (7 if name == "nft" else 5) * per_row


# --- held ----------------------------------------------------------------------------------------


def test_the_weight_by_hand():
    strength = KLStrength(AlgorithmConfig.model_validate({"kl_coef": {"target_share": 0.5}}))
    assert strength.coefficient == 0.0
    assert strength.observe(2.0, 0.0) == {"kl/gradient_share": 0.0, "kl/coef": 0.0}
    assert strength.observe(1.0, 2.0) == {"kl/gradient_share": 0.5, "kl/coef": 0.25}
    assert strength.observe(2.0, 8.0) == {"kl/gradient_share": 0.5, "kl/coef": 0.125}
    # nothing to learn from
    for policy, kl in ((0.0, 1.0), (math.nan, 1.0), (1.0, math.inf), (1.0, math.nan)):
        row = strength.observe(policy, kl)
        assert row["kl/coef"] == 0.125
        assert not math.isfinite(row["kl/gradient_share"])
    # nor from the reference itself
    assert strength.observe(1.0, 0.0) == {"kl/gradient_share": 0.0, "kl/coef": 0.125}


@pytest.fixture(scope="module")
def base():
    return pretrain(0, 300, batch_size=256)


class Watched(Run):
    """Measures the share on all samples of each epoch's first update, of which some set it."""

    def epoch(self, index):
        self.shares = []
        return {**super().epoch(index), "share_of_update": self.shares[0]}

    def _update(self, rollout, shaped, rows):
        silent = shaped._replace(advantage=torch.zeros_like(shaped.advantage))
        parameters, norms = list(self.policy.parameters()), []
        for one, weight in ((shaped, 0.0), (silent, self.strength.coefficient)):
            loss = self._loss(rollout, one, rows, weight).loss
            found = torch.autograd.grad(loss, parameters)
            norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in found)))
        self.shares.append(norms[1] / norms[0])
        return super()._update(rollout, shaped, rows)


@pytest.mark.parametrize("reference", ["static", "adaptive"])
@pytest.mark.parametrize("part", ["base", "hack"])
def test_the_mixture_holds_its_target(base, part, reference):
    method = _method("held", reference, kl_coef={"target_share": 0.3})
    settings = Settings(epochs=26, groups=12, group_size=16)
    run = Watched(find_part(part), method, base, settings, seed=0)
    rows = [run.epoch(index) for index in range(settings.epochs)]
    assert rows[0]["gradient_share"] == rows[0]["coef"] == 0.0
    held = [row for row in rows if row["gradient_share"] > 0]
    assert len(held) >= 18  # of the others, the policy is the reference or nobody probed is gated
    assert [row["gradient_share"] for row in held] == pytest.approx([0.3] * len(held))
    whole = [row["share_of_update"] for row in held]
    assert 0.2 <= sum(whole) / len(whole) <= 0.45
    # the weight had to move by more than the tolerance
    weights = [row["coef"] for row in rows[1:]]
    assert max(weights) > 1.5 * min(weights)


def test_the_embedded_task_holds_its_target_with_a_weight_per_epoch(tmp_path, monkeypatch):
    given, loss = [], grpo.gk.grpo_loss

    def spied(*args, kl_coef, **kwargs):
        given.append(kl_coef)
        return loss(*args, kl_coef=kl_coef, **kwargs)

    monkeypatch.setattr(grpo.gk, "grpo_loss", spied)
    held = {"algorithm.kl_coef": "{target_share: 0.3}", "algorithm.gate.mode": "all", "epochs": 10}
    rows, _ = train_small(tmp_path / "run", **{**STATIC, **held})
    held = [row["kl/gradient_share"] for row in rows if row["kl/gradient_share"]]
    assert len(held) == 9  # but for the first epoch, in which the policy is the reference
    assert held == pytest.approx([0.3] * 9)
    # numbers on the host, one for all steps of an epoch (0 is that of a batch without a gated row)
    assert {type(value) for value in given} == {float}
    assert {value for value in given if value} <= {row["kl/coef"] for row in rows}
