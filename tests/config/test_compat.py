"""The three values of ``algorithm.compat``, and the keys that came with them."""

from __future__ import annotations

import pytest
import yaml

from gardo.config import TRAITS, iter_keys, load_config, to_yaml, validate
from gardo.config.compat import COMPAT, TOGGLES, compat_value
from gardo.types import UserError

KEYS = [dotted for dotted in COMPAT["gardo"] if dotted not in TOGGLES]


def value(config, dotted):
    for part in dotted.split("."):
        config = getattr(config, part)
    return config


@pytest.fixture
def bare(tmp_path):
    """A recipe that sets none of the table's keys."""
    data = yaml.safe_load(to_yaml(load_config("tiny")))
    del data["algorithm"], data["sampling"]["same_latent"]
    path = tmp_path / "bare.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


def test_the_columns_of_the_table_are_complete_and_every_name_is_a_key_or_a_toggle():
    keys = {name for name, _ in iter_keys()}
    assert not keys & set(TOGGLES)
    assert COMPAT["gardo"].keys() <= keys | set(TOGGLES)
    assert COMPAT["gardo"].keys() >= set(TOGGLES)
    assert COMPAT["paper"].keys() == COMPAT["official"].keys() == COMPAT["gardo"].keys()
    # where a paper or code has nothing for an algorithm ours stands in, so it has one for all
    assert not any(isinstance(ours, dict) for ours in COMPAT["gardo"].values())


@pytest.mark.parametrize("algorithm", TRAITS)
@pytest.mark.parametrize("compat", COMPAT)
def test_each_value_of_the_table_is_the_default_under_its_compat(bare, compat, algorithm):
    named = [("algorithm.compat", compat), ("algorithm.name", algorithm)]
    config = load_config(bare, overrides=named)
    expected = {dotted: compat_value(dotted, compat, algorithm) for dotted in KEYS}
    assert {dotted: value(config, dotted) for dotted in KEYS} == expected
    assert config.algorithm.kl_when_ungated == compat_value(TOGGLES[0], compat, algorithm)
    assert config.algorithm.reset_judged_by == compat_value(TOGGLES[2], compat, algorithm)


def test_our_own_is_the_default(bare):
    config = load_config(bare)
    assert config == load_config(bare, overrides=[("algorithm.compat", "gardo")])
    assert {dotted: value(config, dotted) for dotted in KEYS} == {
        dotted: COMPAT["gardo"][dotted] for dotted in KEYS
    }


OTHER = {
    "algorithm.kl_scale": ("exact", "official"),
    "algorithm.kl_reduction": ("gated", "batch"),
    "algorithm.diversity_scale": ("raw", "group_mean"),
    "algorithm.gate.mode": ("all", "off"),
    "algorithm.gate.share_of": ("all", "nonnegative"),
    "algorithm.gate.adaptation": ("paper", "official"),
    "algorithm.reference.kl_threshold": (0.5, 0.0),
    "algorithm.reference.reset_every": (3, 0),
    "algorithm.reference.reset_steps": (7, 0),
    "sampling.same_latent": (True, False),
}


@pytest.mark.parametrize("compat", COMPAT)
@pytest.mark.parametrize("key", KEYS)
def test_each_key_of_the_table_yields_to_an_explicit_value_alone(bare, key, compat):
    named = [("algorithm.compat", compat)]
    plain = load_config(bare, overrides=named)
    for explicit in OTHER[key]:
        typed = load_config(bare, overrides=[*named, (key, str(explicit).lower())])
        changed = {dotted for dotted in KEYS if value(typed, dotted) != value(plain, dotted)}
        assert value(typed, key) == explicit
        assert changed <= {key}
        assert typed.algorithm.compat == compat


@pytest.mark.parametrize(
    ("compat", "mode", "ties"),
    [
        ("gardo", "paper", "half"),
        ("gardo", "official", "ordinal"),
        ("paper", "paper", "strict"),
        ("paper", "official", "strict"),
        ("official", "paper", "ordinal"),
        ("official", "official", "ordinal"),
    ],
)
def test_ties_follow_compat_and_the_mode_of_the_gate(compat, mode, ties):
    pairs = [("algorithm.compat", compat), ("algorithm.gate.mode", mode)]
    assert load_config("tiny", overrides=pairs).algorithm.gate_ties == ties


@pytest.mark.parametrize(("text", "mode"), [("on", "on"), ("off", "off"), ("true", "on")])
def test_the_cap_is_a_switch_in_files_overrides_and_mappings(tmp_path, text, mode):
    file, recipe = tmp_path / "cap.yaml", tmp_path / "recipe.yaml"
    file.write_text(f"algorithm: {{cap: {text}}}\n")
    recipe.write_text(f"base: tiny\n{file.read_text()}")
    nested = yaml.safe_load(to_yaml(load_config("tiny")))
    nested["algorithm"]["cap"] = {"on": "on", "off": "off", "true": True}[text]
    configs = (
        load_config(str(recipe)),
        load_config("tiny", [file]),
        load_config("tiny", overrides=[("algorithm.cap", text)]),
        load_config("tiny", overrides=[("algorithm.cap.mode", text)]),
        validate(nested),
    )
    for config in configs:
        assert (config.algorithm.cap.mode, config.algorithm.cap.percentile) == (mode, 80.0)
        (tmp_path / "dump.yaml").write_text(to_yaml(config))
        assert load_config(str(tmp_path / "dump.yaml")).algorithm == config.algorithm


def test_the_switch_of_the_cap_leaves_its_strength(tmp_path):
    weak, child, on = tmp_path / "weak.yaml", tmp_path / "child.yaml", [("algorithm.cap", "on")]
    weak.write_text("base: tiny\nalgorithm: {cap: {percentile: 99}}\n")
    child.write_text("algorithm: {cap: on}\n")
    for config in (load_config(str(weak), overrides=on), load_config(str(weak), [child])):
        assert (config.algorithm.cap.mode, config.algorithm.cap.percentile) == ("on", 99.0)
    typed = [*on, ("algorithm.cap.percentile", "50")]
    for overrides in (typed, typed[::-1]):
        cap = load_config("tiny", overrides=overrides).algorithm.cap
        assert (cap.mode, cap.percentile) == ("on", 50.0)


@pytest.mark.parametrize(
    ("overrides", "kl_coef", "target"),
    [
        ([("algorithm.kl_coef", "0.2")], 0.2, None),
        ([("algorithm.kl_coef", "0")], 0.0, None),
        ([("algorithm.kl_coef", "{target_share: 0.3}")], {"target_share": 0.3}, 0.3),
        ([("algorithm.kl_coef.target_share", "1")], {"target_share": 1.0}, 1.0),
        (
            [("algorithm.kl_coef", "{target_share: 0.3}"), ("algorithm.kl_coef", "0.1")],
            0.1,
            None,
        ),
    ],
)
def test_kl_coef_is_a_number_or_a_share_to_be_held(tmp_path, overrides, kl_coef, target):
    config = load_config("tiny", overrides=overrides)
    assert config.algorithm.kl_coef == kl_coef
    assert config.algorithm.kl_target == target
    assert config.algorithm.has_kl == (kl_coef != 0)
    (tmp_path / "dump.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "dump.yaml")).algorithm == config.algorithm
    assert validate(yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize(
    ("text", "kept"),
    [("true", True), ("all", True), ("false", False), ("supported", "supported")],
)
def test_values_of_diversity(text, kept):
    config = load_config("tiny", overrides=[("algorithm.diversity", text)])
    assert config.algorithm.diversity == kept
    assert validate(yaml.safe_load(to_yaml(config))) == config


NO_AUX = ("rewards.aux", "[]")
NO_JUDGE = (
    "needs at least one auxiliary reward (rewards.aux), or a proxy that reports its uncertainty "
    "(algorithm.gate.uncertainty sigma)"
)
SHARE = "expected a number from 0 on, or {target_share: NUMBER above 0}, got"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([("kl_coef", "-0.1")], f"algorithm.kl_coef: {SHARE} -0.1"),
        ([("kl_coef", "strong")], f"algorithm.kl_coef: {SHARE} 'strong'"),
        ([("kl_coef", "true")], f"algorithm.kl_coef: {SHARE} True"),
        ([("kl_coef", ".inf")], f"algorithm.kl_coef: {SHARE} inf"),
        ([("kl_coef", "{share: 0.3}")], f"algorithm.kl_coef: {SHARE} {{'share': 0.3}}"),
        (
            [("kl_coef", "{target_share: 0}")],
            "algorithm.kl_coef: expected {target_share: NUMBER above 0} and nothing else, got "
            "{'target_share': 0}",
        ),
        (
            [("kl_coef", "{target_share: 0.3, start: 0.1}")],
            "algorithm.kl_coef: expected {target_share: NUMBER above 0} and nothing else, got "
            "{'target_share': 0.3, 'start': 0.1}",
        ),
        ([("cap", "95")], "algorithm.cap.mode: expected 'off' or 'on', got 95"),
        (
            [("cap.percentile", "101")],
            "algorithm.cap.percentile: expected less than or equal to 100, got 101",
        ),
        (
            [("diversity", "some")],
            "algorithm.diversity: expected true, false, all (which is true) or supported, "
            "got 'some'",
        ),
        (
            [("reward_scale", "auto"), ("advantage_norm", "group_std")],
            "algorithm.reward_scale: auto takes the place of a standard deviation; expected "
            "algorithm.advantage_norm none, got group_std",
        ),
        (
            [("gate.mode", "official"), ("gate.anchor", "base")],
            "algorithm.gate.anchor: expected batch with algorithm.gate.mode official, got base",
        ),
        (
            [("gate.mode", "official"), ("gate.uncertainty", "both")],
            "algorithm.gate.uncertainty: expected ensemble with algorithm.gate.mode official, "
            "got both",
        ),
        (
            [("gate.anchor", "base"), ("gate.scope", "group")],
            "algorithm.gate.anchor: base ranks against the samples of all prompts; expected "
            "algorithm.gate.scope batch, got group",
        ),
        ([NO_AUX], f"algorithm.gate.mode: 'paper' {NO_JUDGE}; without either use gate.mode all"),
        ([NO_AUX, ("gate.uncertainty", "both")], f"algorithm.gate.mode: 'paper' {NO_JUDGE}"),
        ([NO_AUX, ("kl_coef", "0"), ("cap", "on")], f"algorithm.cap: on {NO_JUDGE}"),
        (
            [NO_AUX, ("kl_coef", "0"), ("diversity", "supported")],
            f"algorithm.diversity: supported {NO_JUDGE}",
        ),
        (
            [("diversity", "supported"), ("rewards.features", "null")],
            "algorithm.diversity: needs rewards.features",
        ),
        (
            [("kl_reduction", "microbatch"), ("compat", "paper")],
            "algorithm.kl_reduction: microbatch, which depends on the batch size, is the published "
            "code's; expected gated or batch, or algorithm.compat official",
        ),
    ],
)
def test_contradictions_are_named_in_one_sentence(overrides, expected):
    dotted = [(k if k.startswith("rewards.") else f"algorithm.{k}", v) for k, v in overrides]
    with pytest.raises(UserError) as caught:
        load_config("tiny", overrides=dotted)
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


def test_a_proxy_that_judges_itself_needs_no_auxiliary_reward():
    overrides = [NO_AUX, ("algorithm.gate.uncertainty", "sigma"), ("algorithm.cap", "on")]
    config = load_config("tiny", overrides=overrides)
    assert config.algorithm.needs_judges
    assert config.algorithm.needs_anchor


def test_without_floor_a_fraction_may_start_anywhere():
    wide = [("algorithm.gate.fraction", "0.5"), ("algorithm.gate.adaptation", "paper")]
    assert load_config("tiny", overrides=wide).algorithm.gate.fraction == 0.5
    with pytest.raises(UserError, match=r"an adaptive fraction moves in \[0.02, 0.2\]"):
        load_config("tiny", overrides=wide[:1])


@pytest.mark.parametrize("name", TRAITS)
@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("reward_scale", "auto", "auto"),
        ("diversity", "supported", "supported"),
        ("diversity_scale", "raw", "raw"),
        ("cap.percentile", "70", 70.0),
        ("gate.anchor", "base", "base"),
        ("gate.uncertainty", "sigma", "sigma"),
        ("gate.uncertainty", "both", "both"),
        ("gate.adaptation", "paper", "paper"),
        ("gate.share_of", "all", "all"),
        ("reference.reset_steps", "50", 50),
        ("kl_coef", "{target_share: 0.3}", {"target_share": 0.3}),
    ],
)
def test_new_keys_are_set_from_the_command_line_with_each_algorithm(
    tmp_path, name, key, text, expected
):
    named = [("algorithm.name", name), ("sampling.same_latent", "false")]
    config = load_config("tiny", overrides=[*named, (f"algorithm.{key}", text)])
    assert value(config.algorithm, key) == expected
    (tmp_path / "kept.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "kept.yaml")) == config
