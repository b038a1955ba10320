"""Loading, merging and refusing configurations."""

from __future__ import annotations

import pytest
import yaml

from gardo.config import (
    Config,
    iter_keys,
    load_config,
    on_resume,
    recipe_names,
    to_yaml,
    validate,
)
from gardo.types import UserError

# keys that callers outside this repository rely on
CONTRACT_KEYS = """
seed output_dir epochs device precision
model.path model.family model.lora.rank model.lora.alpha model.full_finetune
prompts.path prompts.generator prompts.per_epoch prompts.group_size
sampling.num_steps sampling.guidance_scale sampling.noise_level sampling.sde sampling.resolution
sampling.batch_size sampling.same_latent sampling.sde_window sampling.cuda_graph
rewards.proxy rewards.aux rewards.eval
algorithm.name algorithm.kl_coef algorithm.clip_range algorithm.adv_clip algorithm.advantage_norm
algorithm.diversity algorithm.gate.mode algorithm.gate.fraction algorithm.gate.adaptive
algorithm.reference.kl_threshold algorithm.reference.reset_every algorithm.compat
train.batch_size train.updates_per_epoch train.learning_rate train.timestep_fraction
train.max_grad_norm train.ema
""".split()


def test_all_keys_of_the_contract_exist_and_are_documented():
    keys = dict(iter_keys())
    assert set(CONTRACT_KEYS) <= keys.keys()
    assert all(field.description for field in keys.values())


# what a change on resume changes; of all other keys it changes results
NOTHING = """
recipe output_dir overwrite epochs trackers model.embedding_cache
rewards.max_missing_share rewards.servers rewards.client.timeout rewards.client.connect_timeout
rewards.client.retries rewards.client.backoff rewards.client.startup_timeout
rewards.client.token_env rewards.client.token_file
evaluation.every evaluation.at_start evaluation.grid_images
checkpoint.every checkpoint.keep_last checkpoint.keep_best checkpoint.best checkpoint.snapshot
health.max_skipped_in_a_row health.stop_on health.patience health.ratio health.ratio_mean
health.clip_fraction health.kl health.grad_norm health.reward_drop health.reward_rise
health.missing health.diversity health.image_variance
""".split()
ROUNDING = """
device threads model.gradient_checkpointing model.attention_backend model.compile model.vae_dtype
model.vae_tiling model.vae_slicing sampling.batch_size sampling.cuda_graph
sampling.offload_trajectories rewards.client.encoding train.batch_size train.fused_optimizer
""".split()


def test_every_key_says_what_its_change_on_resume_changes():
    effects = {name: on_resume(field) for name, field in iter_keys()}
    assert set(effects.values()) == {"nothing", "rounding", "results"}
    assert {name for name, effect in effects.items() if effect == "nothing"} == set(NOTHING)
    assert {name for name, effect in effects.items() if effect == "rounding"} == set(ROUNDING)


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_are_valid_and_reload_from_their_own_dump(name, tmp_path):
    config = load_config(name)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert load_config(str(file)) == config


def test_later_sources_win(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("epochs: 7\ntrain: {learning_rate: 1e-3, batch_size: 8}\n")
    second.write_text("train: {batch_size: 16}\n")
    config = load_config("tiny", [first, second], [("epochs", "9")])
    assert (config.epochs, config.train.learning_rate, config.train.batch_size) == (9, 1e-3, 16)
    assert config.prompts.group_size == load_config("tiny").prompts.group_size


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.learning_rate", "1e-4", 1e-4),
        ("train.learning_rate", "1", 1.0),
        ("algorithm.clip_range", "[1e-4, 2e-4]", (1e-4, 2e-4)),
        ("algorithm.diversity", "false", False),
        ("rewards.aux", "shape_fit", ["shape_fit"]),
        ("rewards.aux", "shape_fit,clean", ["shape_fit", "clean"]),
        ("rewards.aux", "[shape_fit, clean]", ["shape_fit", "clean"]),
        ("output_dir", "2026", "2026"),
        ("sampling.resolution", "null", None),
        ("rewards.parameters", "{count: {color_weight: 1.5}}", {"count": {"color_weight": 1.5}}),
        ("rewards.parameters.count.color_weight", "1.5", {"color_weight": 1.5}),
    ],
)
def test_override_values(key, text, value):
    config = load_config("tiny", overrides=[(key, text)])
    for part in key.split(".")[:3]:
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    assert config == value
    assert type(config) is type(value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([("epoch", "3")], "unknown key 'epoch'; did you mean 'epochs'?"),
        ([("group_size", "3")], "did you mean 'prompts.group_size'?"),
        ([("train.learning_rte", "3")], "did you mean 'train.learning_rate'?"),
        ([("qqqq", "3")], "unknown key 'qqqq'"),
        ([("train.learning_rate", "fast")], "train.learning_rate: expected a valid number"),
        ([("train.learning_rate", "0")], "train.learning_rate: expected greater than 0"),
        ([("train.learning_rate", ".nan")], "train.learning_rate: expected a finite number"),
        ([("epochs", "-1")], "epochs: expected greater than or equal to 0, got -1"),
        ([("epochs", "1.5")], "epochs: expected a valid integer, got 1.5"),
        ([("epochs", "true")], "epochs: expected a valid integer, got True"),
        ([("seed", "abc")], "seed: expected a valid integer, got 'abc'"),
        ([("device", "gpu")], "device: expected 'auto', 'cpu' or 'cuda', got 'gpu'"),
        ([("algorithm.diversity", "1")], "algorithm.diversity: expected true, false, all (which"),
        ([("algorithm.clip_range", "[1e-4]")], "algorithm.clip_range: expected a positive number"),
        ([("algorithm.clip_range", "-1")], "algorithm.clip_range: expected a positive number"),
        ([("algorithm.gate.mode", "on")], "algorithm.gate.mode: expected 'paper'"),
        ([("algorithm.gate.fraction", "0.5")], "an adaptive fraction moves in [0.02, 0.2]"),
        ([("algorithm", "grpo")], "algorithm: expected a section with keys, got 'grpo'"),
        ([("prompts.group_size", "1")], "prompts.group_size: expected greater than or equal to 2"),
        ([("prompts.per_epoch", "0")], "prompts.per_epoch: expected greater than or equal to 1"),
        (
            [("prompts.generator", "null")],
            "expected prompts.path, prompts.dataset or prompts.generator, got none",
        ),
        ([("rewards.aux", "[count]")], "'count' is the proxy and cannot judge itself"),
        ([("rewards.aux", "[]")], "needs at least one auxiliary reward"),
        ([("rewards.features", "null")], "algorithm.diversity: needs rewards.features"),
        ([("train.updates_per_epoch", "1000")], "expected at most per_epoch x group_size = 128"),
        ([("sampling.sde_window", "11")], "that holds the window of 11 steps, got [0, 4]"),
        ([("sampling.sde_window_range", "[4, 2]")], "sampling.sde_window_range: expected 0 <= "),
        ([("sampling.sde", "euler")], "sampling.sde: expected 'flow', 'cps' or 'dance'"),
    ],
)
def test_mistakes_are_named(overrides, expected):
    with pytest.raises(UserError) as caught:
        load_config("tiny", overrides=overrides)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1,", "is not valid YAML"),
        ("- 1\n- 2\n", "expected a mapping of keys, got list"),
        ("!!python/object/apply:os.system ['true']", "is not valid YAML"),
    ],
)
def test_malformed_files_are_named(tmp_path, text, expected):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match="bad.yaml") as caught:
        load_config(str(file))
    assert expected in str(caught.value)


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match="unknown recipe 'tinny'; did you mean 'tiny'"):
        load_config("tinny")
    with pytest.raises(UserError, match=r"config file 'no/such.yaml' does not exist"):
        load_config("no/such.yaml")


def test_dump_holds_every_key():
    dumped = yaml.safe_load(to_yaml(load_config("tiny")))
    for dotted, _ in iter_keys():
        node = dumped
        for part in dotted.split("."):
            node = node[part]
    assert validate(dumped) == load_config("tiny")
    assert isinstance(validate(dumped), Config)
