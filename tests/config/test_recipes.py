"""The built-in recipes: official values, arithmetic, inheritance. Nothing is downloaded."""

from __future__ import annotations

import pytest

from gardo.algorithms.registry import ALGORITHMS
from gardo.config import load_config, recipe_description, recipe_names, to_yaml
from gardo.config.compat import COMPAT, TOGGLES
from gardo.families import FAMILIES
from gardo.planning.counts import count_epoch
from gardo.rewards.registry import feature_names, reward_names
from gardo.types import UserError

TASKS = ("geneval", "ocr", "pickscore")
SIZES = (24, 48, 80)
SD3 = [f"sd35-medium-{task}" for task in TASKS]
SINGLE = [f"{name}-1gpu-{size}gb" for name in SD3 for size in SIZES]
PAPER = ["sd35-medium-geneval-paper", "sd35-medium-ocr-paper", "flux1-dev-hps-paper"]
FLUX = ["flux1-dev-hps", "flux1-dev-pickscore", "flux1-dev-hps-paper"]
FULL_SIZE = [*SD3, *SINGLE, "sd35-large-geneval", *FLUX, *PAPER[:2]]

# the settings of the published configurations (arXiv 2512.24138 and its code)
COMMON = {
    "seed": 42,
    "precision": "bf16",
    "model.max_sequence_length": 128,
    "model.full_finetune": False,
    "prompts.per_epoch": 48,
    "prompts.group_size": 24,
    "sampling.resolution": 512,
    "sampling.sde": "flow",
    "sampling.sde_window": 0,
    "rewards.aux": ["aesthetic", "imagereward"],
    "rewards.features": "dinov3",
    "algorithm.name": "grpo",
    "algorithm.clip_range": 1e-4,
    "algorithm.adv_clip": 5.0,
    "algorithm.advantage_norm": "none",
    "algorithm.diversity": True,
    "algorithm.gate.mode": "paper",
    "algorithm.gate.fraction": 0.1,
    "algorithm.kl_scale": "official",
    "algorithm.reference.kl_threshold": 3e-4,
    "algorithm.reference.reset_every": 16,
    "train.updates_per_epoch": 2,
    "train.learning_rate": 3e-4,
    "train.adam_beta1": 0.9,
    "train.adam_beta2": 0.999,
    "train.adam_eps": 1e-8,
    "train.weight_decay": 1e-4,
    "train.max_grad_norm": 1.0,
    "train.timestep_selection": "first",
    "train.ema": True,
    "train.ema_decay": 0.9,
    "train.ema_every": 8,
}
MEDIUM = {
    "model.path": "stabilityai/stable-diffusion-3.5-medium",
    "model.lora.rank": 32,
    "model.lora.alpha": 64,
    "sampling.num_steps": 10,
    "sampling.guidance_scale": 4.5,
    "sampling.noise_level": 0.7,
    "sampling.same_latent": False,
    "train.timestep_fraction": 0.89,
    "evaluation.every": 60,
    "evaluation.num_steps": 40,
}
DEV = {
    "model.path": "black-forest-labs/FLUX.1-dev",
    "model.lora.rank": 64,
    "model.lora.alpha": 128,
    "sampling.num_steps": 6,
    "sampling.guidance_scale": 3.5,
    "sampling.noise_level": 0.9,
    "sampling.same_latent": True,
    "sampling.batch_size": 3,
    "train.timestep_fraction": 0.7,
    "algorithm.kl_coef": 0.01,
    "evaluation.every": 30,
    "evaluation.num_steps": 28,
}
OWN = {
    "sd35-medium-geneval": {"rewards.proxy": "geneval", "algorithm.kl_coef": 0.07},
    "sd35-medium-ocr": {"rewards.proxy": "ocr", "algorithm.kl_coef": 0.04},
    "sd35-medium-pickscore": {"rewards.proxy": "pickscore", "algorithm.kl_coef": 0.01},
    "flux1-dev-hps": {"rewards.proxy": "hpsv2"},
    "flux1-dev-pickscore": {"rewards.proxy": "pickscore"},
}
# where the paper and the configurations published with its code differ
AS_THE_PAPER_HAS_IT = {
    "sampling.batch_size": 6,
    "train.batch_size": 6,
    "algorithm.compat": "paper",
    "algorithm.kl_coef": 0.04,
    **{dotted: of for dotted, of in COMPAT["paper"].items() if dotted not in TOGGLES},
    "sampling.same_latent": True,
}


def value(config, dotted):
    for part in dotted.split("."):
        config = getattr(config, part)
    return config


def expected_values(name):
    parent = name.split("-1gpu")[0].removesuffix("-paper")
    family = DEV if name in FLUX else {} if "large" in name else MEDIUM
    paper = AS_THE_PAPER_HAS_IT if name in PAPER else {}
    return {**COMMON, **family, **OWN.get(parent, {}), **paper}


def test_all_recipes_of_the_plan_exist():
    assert set(recipe_names()) == {"tiny", "tiny-nft", "sd35-medium-geneval-nft", *FULL_SIZE}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_official_values(name):
    config = load_config(name)
    expected = expected_values(name)
    assert {dotted: value(config, dotted) for dotted in expected} == expected
    assert config.output_dir == f"runs/{name}"


@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_of_the_paper_differs_from_the_published_one_in_the_papers_values_alone(name):
    paper = flat(load_config(name).model_dump())
    official = flat(load_config(name.removesuffix("-paper")).model_dump())
    different = {dotted for dotted in paper if paper[dotted] != official[dotted]}
    free = {"recipe", "output_dir", "epochs", "model.gradient_checkpointing"}
    assert different <= {*free, *AS_THE_PAPER_HAS_IT}


@pytest.mark.parametrize("name", SD3)
def test_official_batch_of_eight_gpus(name):
    config = load_config(name)
    assert (config.sampling.batch_size, config.train.batch_size) == (9, 9)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_rewards_and_features_exist(name):
    rewards = load_config(name).rewards
    assert {rewards.proxy, *rewards.aux, *rewards.eval} <= set(reward_names())
    assert rewards.features in feature_names()
    assert not {rewards.proxy, *rewards.aux} & set(rewards.eval), (
        "held-out rewards are not held out"
    )


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize("name", FULL_SIZE)
def test_batches_divide_for_any_number_of_processes(name, processes):
    config = load_config(name)
    flux = name in FLUX
    counts = count_epoch(config, processes, FAMILIES["flux" if flux else "sd3"])
    steps, trained, rows = (6, 4, 1) if flux else (10, 8, 2)
    assert counts.samples == 1152
    assert counts.samples_per_process == 1152 // processes
    assert (counts.num_steps, counts.trained_steps) == (steps, trained)
    assert counts.rollout_rows == 1152 * steps * rows
    assert counts.train_rows == 1152 * trained * rows
    assert (counts.padded_rollout, counts.padded_train) == (0, 0)
    # equal batches: otherwise matrix products, and with them on-policy ratios, may differ
    assert counts.rollout_batch == counts.train_batch


@pytest.mark.parametrize("name", SINGLE)
def test_single_gpu_variants_differ_in_memory_alone(name):
    memory = {
        "recipe",
        "output_dir",
        "model.gradient_checkpointing",
        "model.vae_dtype",
        "model.vae_slicing",
        "sampling.batch_size",
        "sampling.cuda_graph",
        "sampling.offload_trajectories",
        "train.batch_size",
        "rewards.eval",
    }
    ours = flat(load_config(name).model_dump())
    parent = flat(load_config(name.split("-1gpu")[0]).model_dump())
    different = {dotted for dotted in ours if ours[dotted] != parent[dotted]}
    assert different <= memory
    assert set(load_config(name).rewards.eval) <= set(parent["rewards.eval"])


def flat(data, prefix=""):
    out = {}
    for name, item in data.items():
        if isinstance(item, dict):
            out |= flat(item, f"{prefix}{name}.")
        else:
            out[f"{prefix}{name}"] = item
    return out


@pytest.mark.parametrize("name", recipe_names())
def test_descriptions_fit_a_line_of_the_list(name):
    description = recipe_description(name)
    assert description
    assert not description.endswith((",", ":"))
    if name != "tiny":
        assert len(description) <= 48


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ([], 8),
        ([("train.timestep_fraction", "1.0")], 9),  # the last step ends at sigma 0
        ([("sampling.sde_window", "3"), ("train.timestep_fraction", "1.0")], 3),
        ([("sampling.sde", "cps")], 8),  # of 9: the last has no noise
    ],
)
def test_trained_steps(overrides, steps):
    config = load_config("sd35-medium-ocr", overrides=overrides)
    assert ALGORITHMS[config.algorithm.name].count_trained_steps(config) == steps


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_base_merges_sections_and_replaces_lists(tmp_path):
    write(
        tmp_path,
        grand="base: tiny\nepochs: 3\nrewards: {aux: [clean]}\ntrain: {batch_size: 8}\n",
        parent="base: grand.yaml\ntrain: {learning_rate: 1e-5}\n",
        child="base: parent.yaml\nepochs: 4\n",
    )
    config = load_config(str(tmp_path / "child.yaml"))
    assert (config.epochs, config.train.batch_size, config.train.learning_rate) == (4, 8, 1e-5)
    assert config.rewards.aux == ["clean"]
    assert config.prompts == load_config("tiny").prompts
    assert config.recipe == "child"
    assert "base" not in to_yaml(config)


def test_bases_in_a_circle_are_refused(tmp_path):
    write(tmp_path, a="base: b.yaml\n", b="base: a.yaml\n", own="base: own.yaml\n")
    for name in ("a", "own"):
        with pytest.raises(UserError, match="recipes are each other's base") as caught:
            load_config(str(tmp_path / f"{name}.yaml"))
        assert f"{name}.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base: 3\n", "base: expected a recipe's name or path"),
        ("base: tinny\n", "unknown recipe 'tinny'; did you mean 'tiny'"),
        ("base: gone.yaml\n", "gone.yaml' does not exist"),
    ],
)
def test_wrong_bases_are_named(tmp_path, text, expected):
    write(tmp_path, a=text)
    with pytest.raises(UserError) as caught:
        load_config(str(tmp_path / "a.yaml"))
    assert expected in str(caught.value)


def test_a_base_on_the_command_line_is_an_unknown_key():
    with pytest.raises(UserError, match="unknown key 'base'"):
        load_config("tiny", overrides=[("base", "sd35-medium-ocr")])


def test_off_is_a_word(tmp_path):
    write(tmp_path, a="base: tiny\nsampling: {cuda_graph: off}\nalgorithm: {gate: {mode: off}}\n")
    config = load_config(str(tmp_path / "a.yaml"), overrides=[("algorithm.diversity", "false")])
    assert (config.sampling.cuda_graph, config.algorithm.gate.mode) == ("off", "off")
    assert config.algorithm.diversity is False
    (tmp_path / "dump.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "dump.yaml")) == config
