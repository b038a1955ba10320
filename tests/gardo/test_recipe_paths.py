"""The code path of every full-size recipe, two epochs long, on tiny pipelines of the same classes.

Everything that a recipe says about sampling, shaping, training and memory stays as it is, but for
the precision of SD3.5; the model, the number of samples, the prompts and the rewards are small.
"""

from __future__ import annotations

import json

import pytest
from accelerate.state import AcceleratorState

from gardo.config import load_config, recipe_names
from gardo.tiny import pipeline_path
from gardo.train import train
from tools.tiny.models import build_flux_pipeline

FULL_SIZE = [name for name in recipe_names() if name.startswith(("sd35", "flux1"))]

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


# SD3.5 in bfloat16 takes a CPU without instructions for it eight times as long, four minutes each;
# test_training runs that family in half precision, FLUX.1 keeps it here.
PRECISION = {"sd35": {"precision": "fp32"}, "flux1": {}}


def small(name, **places):
    """The configuration of a recipe at the size of these tests."""
    settings = {**SMALL, **PRECISION[name.split("-")[0]], **places}
    return load_config(name, overrides=list(settings.items()))


def distinct_paths():
    """Of recipes that differ in the weight of the KL alone at this size, the first."""
    first = {}
    for name in FULL_SIZE:
        # the variants for one GPU differ from each other in batch sizes alone
        if name.endswith(("48gb", "80gb")):
            continue
        settings = small(name, output_dir="run").model_dump()
        del settings["recipe"], settings["algorithm"]["kl_coef"]
        first.setdefault((name.split("-")[0], json.dumps(settings, default=str)), name)
    return list(first.values())


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


@pytest.mark.parametrize("name", FULL_SIZE)
def test_these_settings_leave_algorithm_and_training_alone(name):
    recipe, config = load_config(name), small(name)
    for area in ("algorithm", "train"):
        assert getattr(config, area) == getattr(recipe, area)


@pytest.mark.parametrize("name", distinct_paths())
@pytest.mark.usefixtures("fresh_accelerator")
def test_two_epochs_of_the_recipe(name, pipelines, tmp_path):
    places = {"model.path": pipelines[name.split("-")[0]], "output_dir": str(tmp_path / "run")}
    train(small(name, **places))
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    for row in map(json.loads, text.splitlines()):
        assert row["grad_norm"] > 0
        # sampling and training run at batch sizes of their own
        assert row.get("ratio/max_abs_dev", 0.0) < 1e-3
    assert (tmp_path / "run" / "export" / "pytorch_lora_weights.safetensors").is_file()
