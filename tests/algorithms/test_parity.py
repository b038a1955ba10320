"""The check, before the first update, that training sees the log-probs that sampling stored."""

from __future__ import annotations

import pytest
import torch

from gardo.algorithms.parity import check_parity, ratio_deviation
from gardo.config import load_config
from gardo.distributed.process import Runtime
from gardo.run.folder import RunFolder
from gardo.sampling.plan import plan_epoch
from gardo.sampling.steps import step_table
from gardo.trainer import Trainer
from gardo.types import UserError
from tests.gardo.test_training import SHORT
from tests.support.tiny import PROMPTS

CPU = torch.device("cpu")


@pytest.fixture
def rollout(make_sampler, model, adapters):
    table = step_table(model.schedule(4, 24), CPU, kind="flow", noise_level=0.7)
    sampler = make_sampler(2.5)
    rollout, fill = sampler.rollout(plan_epoch(2, 3, 2), PROMPTS, table, 0, 0, False)
    list(fill)
    return rollout


def test_equal_forwards_agree_exactly_and_are_not_counted(rollout, make_sampler):
    sampler = make_sampler(2.5)
    rows = sampler.model.rows
    assert ratio_deviation(sampler, rollout, rollout.table.trainable, 4) == 0
    assert sampler.model.rows == rows


def test_a_difference_is_measured(rollout, make_sampler):
    rollout.log_prob[1, 0] += 0.01
    deviation = ratio_deviation(make_sampler(2.5), rollout, (0, 1), 4)
    assert float(deviation) == pytest.approx(1 - torch.exp(torch.tensor(-0.01)).item(), rel=1e-3)
    assert ratio_deviation(make_sampler(2.5), rollout, (0,), 4) == 0


@pytest.mark.parametrize("worst", [0.02, float("nan")])
def test_above_the_bound_the_run_stops_with_an_explanation(worst):
    runtime, deviation = Runtime("cpu"), torch.tensor(worst)
    with pytest.raises(UserError, match="max .ratio - 1. is .*health.ratio .*batch_size"):
        check_parity(deviation, 0.01, runtime)
    if worst == worst:
        assert check_parity(deviation, None, runtime) == pytest.approx(worst)


def test_a_run_stops_before_its_first_update(tmp_path, monkeypatch):
    overrides = [*SHORT.items(), ("output_dir", str(tmp_path / "run"))]
    config = load_config("tiny", overrides=overrides)
    trainer = Trainer(config, Runtime("cpu"))
    before = trainer.adapters.state_dict("policy")
    velocity = trainer.sampler.velocity

    def another(*args):  # sampling does not come here
        v = velocity(*args)
        return v._replace(cond=1.1 * v.cond)

    monkeypatch.setattr(trainer.sampler, "velocity", another)
    with pytest.raises(UserError, match="before the first update"):
        trainer.train(RunFolder.create(config))
    for name, value in trainer.adapters.state_dict("policy").items():
        assert torch.equal(value, before[name])
