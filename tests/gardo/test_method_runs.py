"""Whole runs of the method's keys: scale of the proxy, rewards with sigma, the paper's mode."""

from __future__ import annotations

import pytest
import torch
import yaml

import gardo.trainer
from gardo.config import load_config, to_yaml
from gardo.types import RewardOutput
from tests.support.everything import ALGORITHMS, train_small

# --- the scale of the proxy ----------------------------------------------------------------------

OF_THE_REWARD = {"reward/proxy/mean", "reward/proxy/std", "reward_scale"}


def scaled(folder, name, weight, **changes):
    keys = {**ALGORITHMS[name], "seed": 3, "rewards.proxy": f"{{count: {weight}}}", **changes}
    return train_small(folder / f"{name}-{weight}", **keys)


def same_metrics(rows, others, **tolerance):
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for key, value in row.items():
            if key in OF_THE_REWARD:
                assert value != other[key], key
            elif value is None:
                assert other[key] is None, key
            elif not key.startswith("time/") and key != "images_per_second":
                assert value == pytest.approx(other[key], nan_ok=True, **tolerance), key


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_scale_of_the_proxy_changes_its_report_alone(tmp_path, name):
    rows, weights = scaled(tmp_path, name, 0.25)
    assert all(row["advantage/rms"] > 0.1 and row["cap/share"] > 0 for row in rows)
    assert rows[1]["kl/gradient_share"] > 0
    others, bits = scaled(tmp_path, name, 4)
    same_metrics(rows, others, rel=0, abs=0)
    assert all(torch.equal(value, bits[key]) for key, value in weights.items())
    for weight in (0.1, 10):
        others, close = scaled(tmp_path, name, weight)
        same_metrics(rows, others, rel=1e-5, abs=1e-6)
        for key, value in weights.items():
            torch.testing.assert_close(value, close[key], rtol=1e-5, atol=1e-8)


def test_without_a_scale_it_changes_the_run(tmp_path):
    off = {"algorithm.reward_scale": "none"}
    (_, weights), (_, others) = (scaled(tmp_path, "nft", w, **off) for w in (0.25, 4))
    assert any(not torch.allclose(v, others[key], rtol=1e-2) for key, v in weights.items())


# --- rewards that report their uncertainty -------------------------------------------------------


def hazy(images, prompts, metadata):
    """Of a batch's first image it does not know how sure it is."""
    sigma = images[:, 1].mean((1, 2)) / 10
    sigma[0] = torch.nan
    return RewardOutput(images[:, 0].mean((1, 2)), sigma=sigma)


def clear(images, prompts, metadata):
    return RewardOutput(images[:, 2].mean((1, 2)), sigma=images[:, 0].mean((1, 2)) / 20)


HAZY, CLEAR = (f"{__name__}:{f.__name__}" for f in (hazy, clear))


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("grpo", {"algorithm.gate.uncertainty": "sigma", "rewards.aux": "[]"}),
        ("nft", {"algorithm.gate.uncertainty": "sigma", "rewards.aux": "[]"}),
        (
            "nft",
            {"algorithm.gate.uncertainty": "both", "rewards.proxy": f"{{{HAZY}: 2, {CLEAR}: -1}}"},
        ),
    ],
    ids=["grpo", "nft", "both-weighted"],
)
def test_a_proxy_that_reports_its_uncertainty_is_gated_by_it(tmp_path, monkeypatch, name, keys):
    shaped, shape = [], gardo.trainer.Shaper.__call__

    def watched(self, *args):
        shaped.append(shape(self, *args))
        return shaped[-1]

    monkeypatch.setattr(gardo.trainer.Shaper, "__call__", watched)
    keys = {"rewards.proxy": HAZY, "rewards.max_missing_share": 0.2, **keys}
    rows, _ = train_small(tmp_path / "run", **{**ALGORITHMS[name], **keys})
    assert all(row["grad_norm"] > 0 and row["gate/share"] > 0 for row in rows)
    assert rows[1]["kl/gradient_share"] > 0
    assert all(row[f"reward/{HAZY}/sigma"] > 0 for row in rows)
    assert (shaped[0].advantage != 0).sum() > 6
    for epoch in shaped:
        # one of the batch of 12 has no sigma and takes no part
        assert epoch.advantage[0] == 0
        assert not epoch.gate[0]


# --- the paper's mode ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The embedded recipe without what it says of the same start of a group."""
    path = tmp_path_factory.mktemp("recipe") / "paper.yaml"
    data = yaml.safe_load(to_yaml(load_config("tiny")))
    # complete, it would be the file of an earlier version, in which paper meant something else
    del data["sampling"]["same_latent"], data["recipe"], data["overwrite"]
    path.write_text(yaml.safe_dump({**data, "algorithm": {"compat": "paper"}}))
    return str(path)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_papers_mode_from_end_to_end(tmp_path, monkeypatch, recipe, name):
    made, starts, update = [], [], gardo.trainer.update_if_finite

    def first_left_out(algorithm, health, epoch, data, index, stats):
        if index == 0:
            starts.append(data.rollout.latents[0, :3].clone())
        if (epoch, index) == (0, 0):
            return False
        made.append((epoch, index))
        return update(algorithm, health, epoch, data, index, stats)

    monkeypatch.setattr(gardo.trainer, "update_if_finite", first_left_out)
    keys = {"algorithm.name": name, "epochs": 6, "algorithm.reference.kl_threshold": 0}
    keys |= {"algorithm.reference.reset_steps": 3}
    assert load_config(recipe).algorithm.reference.reset_steps == 100
    rows, _ = train_small(tmp_path / "run", recipe, **keys)
    # 1, 3 steps: reset; 2, 4: reset; 2, 4: reset
    assert [row["reference/reset"] for row in rows] == [0, 1, 0, 1, 0, 1]
    assert len(made) == 11
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert kept["sampling"]["same_latent"] == (name == "grpo")
    # samples alternate between two prompts; DiffusionNFT has put noised samples in their place
    assert torch.equal(starts[0][0], starts[0][2]) == (name == "grpo")
    assert not torch.equal(starts[0][0], starts[0][1])
    # above the 0.9 quantile of 12
    assert all(row["gate/share"] <= 2 / 12 for row in rows)
