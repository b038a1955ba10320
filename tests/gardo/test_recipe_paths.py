"""The code path of every full-size recipe, two epochs long, on tiny pipelines of the same classes.

Everything that a recipe says about sampling, shaping, training and memory stays as it is; the
model, the number of samples, the prompts and the rewards are small.
"""

from __future__ import annotations

import json

import pytest
from accelerate.state import AcceleratorState

from gardo.config import load_config, recipe_names
from gardo.tiny import pipeline_path
from gardo.tiny.models import build_flux_pipeline
from gardo.train import train

FULL_SIZE = [name for name in recipe_names() if name.startswith(("sd35", "flux1"))]
# the variants for one GPU differ from each other in batch sizes alone
DISTINCT = [name for name in FULL_SIZE if not name.endswith(("48gb", "80gb"))]

SMALL = {
    "epochs": "2",
    "device": "cpu",
    "threads": "1",
    "model.lora.rank": "4",
    "model.embedding_cache": "null",
    "prompts.path": "null",
    "prompts.dataset": "null",
    "prompts.generator": "shapes",
    "prompts.parameters": "{}",
    "prompts.per_epoch": "4",
    "prompts.group_size": "4",
    "sampling.resolution": "24",
    "rewards.proxy": "jpeg_compressibility",  # tells apart the noise of untrained models, too
    "rewards.aux": "shape_fit,clean",
    "rewards.eval": "strict_count",
    "rewards.parameters": "{}",
    "rewards.servers": "{}",
    "rewards.features": "judge",
    "evaluation.max_prompts": "2",
    "evaluation.samples_per_prompt": "2",
    "evaluation.num_steps": "3",
    "evaluation.every": "0",
}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    flux = tmp_path_factory.mktemp("flux")
    build_flux_pipeline(seed=0).save_pretrained(flux)
    return {"sd35": str(pipeline_path()), "flux1": str(flux)}


@pytest.fixture
def fresh_accelerator():
    """Accelerate keeps the precision of the first run of a process, and refuses another."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_there_are_recipes_of_both_families():
    assert {name.split("-")[0] for name in FULL_SIZE} == {"sd35", "flux1"}


@pytest.mark.parametrize("name", DISTINCT)
@pytest.mark.usefixtures("fresh_accelerator")
def test_two_epochs_of_the_recipe(name, pipelines, tmp_path):
    settings = {
        **SMALL,
        "model.path": pipelines[name.split("-")[0]],
        "output_dir": str(tmp_path / "run"),
    }
    recipe = load_config(name)
    config = load_config(name, overrides=list(settings.items()))
    for area in ("algorithm", "train"):
        assert getattr(config, area) == getattr(recipe, area)
    train(config)
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    for row in map(json.loads, text.splitlines()):
        assert row["grad_norm"] > 0
        # sampling and training run at batch sizes of their own
        assert row.get("ratio/max_abs_dev", 0.0) < 1e-3
    assert (tmp_path / "run" / "export" / "pytorch_lora_weights.safetensors").is_file()
