"""An algorithm is one file and one line in the registry: neither trainer nor planner knows any."""

from __future__ import annotations

import json
from typing import get_args

import pytest

from gardo.algorithms.nft import NFT
from gardo.algorithms.registry import ALGORITHMS
from gardo.config import TRAITS, AlgorithmConfig, load_config
from gardo.distributed.process import Runtime
from gardo.models.adapters import POLICY, REFERENCE
from gardo.plan import plan
from gardo.run.folder import RunFolder
from gardo.trainer import Trainer
from tests.gardo.test_training import SHORT


def test_the_configuration_knows_the_algorithms_of_the_registry():
    assert get_args(AlgorithmConfig.model_fields["name"].annotation) == tuple(ALGORITHMS)
    assert {name: algorithm.traits for name, algorithm in ALGORITHMS.items()} == TRAITS


class Averaged(NFT):
    """Draws with a companion of its own name, which runs twice on every sample."""

    adapter_names = (POLICY, REFERENCE, "old", "average")
    sampled_by = "average"
    extra_forwards = 2

    @classmethod
    def count_trained_steps(cls, config):
        return 3


@pytest.fixture
def config(tmp_path, monkeypatch):
    # under a name that the configuration has; it is the only one that the settings know
    monkeypatch.setitem(ALGORITHMS, "nft", Averaged)
    overrides = {
        **SHORT,
        "algorithm.name": "nft",
        "sampling.same_latent": "false",
        "output_dir": str(tmp_path / "run"),
        "epochs": "1",
        "checkpoint.every": "1",
        "evaluation.every": "0",
        "evaluation.at_start": "false",
    }
    return load_config("tiny", overrides=list(overrides.items()))


def test_the_planner_asks_the_registered_algorithm(config):
    planned = plan(config)
    assert planned.counts.trained_steps == 3
    assert planned.counts.behaviour_rows == 2 * 3 * 16
    items = {item.name: item.bytes for item in planned.memory.items}
    assert items["LoRA of policy, reference, behaviour policy and average"] == (
        4 * 4 * planned.trainable
    )


def test_the_trainer_asks_the_registered_algorithm(config):
    trainer = Trainer(config, Runtime("cpu"))
    assert trainer.adapters.names == Averaged.adapter_names
    folder = RunFolder.create(config)
    trainer.train(folder)
    (row,) = map(json.loads, (folder.path / "metrics.jsonl").read_text().splitlines())
    assert row["grad_norm"] > 0
    assert "ratio/max_abs_dev" not in row
    saved = {path.stem for path in (folder.checkpoints / "epoch_0001").glob("*.safetensors")}
    assert saved == {*Averaged.adapter_names, "optimizer"}
