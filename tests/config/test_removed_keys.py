"""Keys of earlier versions: refused with what replaces them, dropped where they change nothing."""

from __future__ import annotations

import pytest
import yaml

from gardo.config import load_config, to_yaml
from gardo.config.compat import compat_value
from gardo.types import UserError

BOUND = "sampling.max_ratio_deviation"
# keys that came with the third value of algorithm.compat
NEW = ("diversity_scale", "reward_scale", "cap")
NEW_OF_SECTIONS = {"gate": ("adaptation", "anchor", "uncertainty"), "reference": ("reset_steps",)}

OURS = {
    "algorithm.kl_when_ungated": "none",
    "algorithm.gate.ties": "auto",
    "algorithm.reference.judged_by": "epoch",
}
OFFICIAL = {
    "algorithm.kl_when_ungated": "none",
    "algorithm.gate.ties": "ordinal",
    "algorithm.reference.judged_by": "update",
}


def former(overrides=(), **values):
    """A complete configuration as earlier versions wrote it, with dotted ``values``."""
    data = yaml.safe_load(to_yaml(load_config("tiny", overrides=overrides)))
    algorithm = data["algorithm"]
    for section, names in (("", NEW), *NEW_OF_SECTIONS.items()):
        for name in names:
            del (algorithm[section] if section else algorithm)[name]
    if algorithm["compat"] == "gardo":
        algorithm["compat"] = "paper"
    for dotted, value in {BOUND: 1e-3, "health.ratio": 0.01, **OURS, **values}.items():
        *sections, name = dotted.split(".")
        area = data
        for part in sections:
            area = area[part]
        area[name] = value
    return data


@pytest.fixture
def file(tmp_path):
    def write(data):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(data))
        return path

    return write


@pytest.mark.parametrize("value", ["1e-3", "0.01", "null"])
def test_a_removed_key_that_is_typed_is_refused_with_the_new_one(value):
    with pytest.raises(UserError, match=f"^{BOUND}: renamed to health.ratio$"):
        load_config("tiny", overrides=[(BOUND, value)])


def test_a_file_of_an_earlier_version_holds_as_far_as_it_says_what_holds_anyway(file):
    path = file(former())
    config = load_config(str(path))
    assert load_config("tiny", [path]) == config == load_config("tiny")
    assert BOUND.split(".")[1] not in to_yaml(config)


@pytest.mark.parametrize(
    ("bound", "alarm", "ratio"),
    [
        (1e-3, 0.01, 1e-3),
        (0.05, 0.01, 0.01),
        (None, 0.01, 0.01),
        (1e-3, None, 1e-3),
        (None, None, None),
    ],
)
def test_of_two_bounds_in_a_file_the_stricter_holds(file, bound, alarm, ratio):
    path = file(former(**{BOUND: bound, "health.ratio": alarm}))
    assert load_config(str(path)).health.ratio == ratio
    typed = load_config(str(path), overrides=[("health.ratio", "0.2")])
    assert typed.health.ratio == 0.2


@pytest.mark.parametrize("bound", [0.05, None, "1e-3 or so"])
def test_the_former_bound_alone_in_a_file_is_refused_with_the_new_name(file, bound):
    data = former(**{BOUND: bound})
    del data["health"]["ratio"]
    for recipe, files in ((str(file(data)), []), ("tiny", [file(data)])):
        with pytest.raises(UserError, match=f"^{BOUND}: renamed to health.ratio$"):
            load_config(recipe, files)


def test_the_former_default_alone_in_a_file_is_the_default(file):
    data = former()
    del data["health"]["ratio"]
    assert load_config(str(file(data))).health.ratio == 1e-3


@pytest.mark.parametrize("ratio", ["much", [1]])
def test_a_wrong_bound_of_a_file_is_named(file, ratio):
    with pytest.raises(UserError, match=r"sampling.max_ratio_deviation: renamed to health.ratio"):
        load_config(str(file(former(**{"health.ratio": ratio}))))


COMPAT = ("algorithm.compat", "official")
PAPER = ("algorithm.compat", "paper")
NFT = [("algorithm.name", "nft"), ("sampling.same_latent", "false")]
MODE = ("algorithm.gate.mode", "official")


@pytest.mark.parametrize(
    ("overrides", "values"),
    [
        ([], {}),
        ([], {"algorithm.gate.ties": "half"}),
        ([MODE], {}),
        ([MODE], {"algorithm.gate.ties": "ordinal"}),
        ([COMPAT], OFFICIAL),
        ([COMPAT], {**OFFICIAL, "algorithm.gate.ties": "auto"}),
        ([COMPAT, *NFT], {**OFFICIAL, "algorithm.kl_when_ungated": "all"}),
    ],
)
def test_toggles_of_a_file_that_say_what_compat_says_are_dropped(file, overrides, values):
    path = file(former(overrides, **values))
    expected = load_config("tiny", overrides=overrides)
    for same in (load_config("tiny", [path]), load_config(str(path), to_evaluate=True)):
        assert same == load_config(str(path)) == expected


ONLY_OFFICIAL, ONLY_OURS, NOT_OURS, NOT_OFFICIAL = (
    f"only algorithm.compat {compats} does that"
    for compats in ("official", "gardo", "paper or official", "paper or gardo")
)
NONE = "no algorithm.compat does that with the other settings, got"
DEVIATIONS = [
    ([], ("kl_when_ungated", "all"), f"{NONE} 'all'"),
    ([], ("gate.ties", "ordinal"), ONLY_OFFICIAL),
    ([], ("reference.judged_by", "update"), NOT_OURS),
    ([MODE], ("gate.ties", "half"), f"{NONE} 'half'"),
    ([COMPAT, ("algorithm.gate.mode", "paper")], ("gate.ties", "half"), ONLY_OURS),
    ([COMPAT], ("reference.judged_by", "epoch"), ONLY_OURS),
    ([COMPAT, *NFT], ("kl_when_ungated", "none"), NOT_OFFICIAL),
    (NFT, ("kl_when_ungated", "all"), ONLY_OFFICIAL),
]


@pytest.mark.parametrize(("overrides", "toggle", "advice"), DEVIATIONS)
def test_toggles_that_deviate_are_refused_in_files_and_typed(file, overrides, toggle, advice):
    key, value = f"algorithm.{toggle[0]}", toggle[1]
    implied = OFFICIAL if COMPAT in overrides else OURS
    if COMPAT in overrides and NFT[0] in overrides:
        implied = {**OFFICIAL, "algorithm.kl_when_ungated": "all"}
    path = file(former(overrides, **{**implied, key: value}))
    for recipe, files, typed in (
        (str(path), [], []),
        ("tiny", [path], []),
        ("tiny", [], [(key, value), *overrides]),
    ):
        with pytest.raises(UserError) as caught:
            load_config(recipe, files, typed)
        assert str(caught.value) == f"{key}: gone; {advice}"


@pytest.mark.parametrize(
    ("overrides", "key", "value", "compat"),
    [
        ([], "algorithm.gate.ties", "half", "gardo"),
        ([], "algorithm.gate.ties", "auto", "gardo"),
        ([], "algorithm.kl_when_ungated", "none", "gardo"),
        ([PAPER], "algorithm.gate.ties", "strict", "paper"),
        ([PAPER], "algorithm.reference.judged_by", "update", "paper"),
        ([COMPAT], "algorithm.gate.ties", "ordinal", "official"),
        ([COMPAT], "algorithm.reference.judged_by", "update", "official"),
    ],
)
def test_a_typed_toggle_that_says_what_holds_is_to_be_left_out(overrides, key, value, compat):
    advice = f"{key}: gone; this is what algorithm.compat {compat} does: leave it out"
    with pytest.raises(UserError) as caught:
        load_config("tiny", overrides=[(key, value), *overrides])
    assert str(caught.value) == advice


def test_a_removed_key_written_with_its_dots_is_not_unknown(file):
    with pytest.raises(UserError, match=r"^algorithm.kl_when_ungated: gone; this is what"):
        load_config(str(file({"algorithm.kl_when_ungated": "none"})))
    with pytest.raises(UserError, match=f"^{BOUND}: renamed to health.ratio$"):
        load_config("tiny", [file({BOUND: 1e-3})])


def test_a_wrong_compat_is_what_is_named(file):
    message = r"^algorithm.compat: expected 'paper', 'official' or 'gardo'"
    with pytest.raises(UserError, match=message):
        load_config(str(file(former(**{"algorithm.compat": "oficial"}))))
    typed = [("algorithm.compat", "oficial"), ("algorithm.gate.ties", "half")]
    with pytest.raises(UserError, match=message):
        load_config("tiny", overrides=typed)


def test_toggles_of_a_file_are_judged_by_the_file_and_what_it_builds_on(file, tmp_path):
    path = file(former())
    config = load_config(str(path), overrides=[COMPAT])
    assert config.algorithm.compat == "official"
    assert config.algorithm.reset_judged_by == "update"
    official = tmp_path / "official.yaml"
    official.write_text("base: tiny\nalgorithm: {compat: official}")
    derived = tmp_path / "derived.yaml"
    derived.write_text("base: official.yaml\nalgorithm: {reference: {judged_by: update}}")
    assert load_config(str(derived)).algorithm == load_config(str(official)).algorithm
    derived.write_text("base: official.yaml\nalgorithm: {reference: {judged_by: epoch}}")
    with pytest.raises(UserError, match=f"judged_by: gone; {ONLY_OURS}"):
        load_config(str(derived))


@pytest.mark.parametrize(("overrides", "toggle", "_"), DEVIATIONS)
def test_an_evaluation_does_not_depend_on_toggles(file, overrides, toggle, _):
    path = file(former(overrides, **{f"algorithm.{toggle[0]}": toggle[1]}))
    expected = load_config("tiny", overrides=overrides)
    assert load_config(str(path), to_evaluate=True) == expected


def test_an_evaluation_does_not_depend_on_how_the_kl_was_reduced(file):
    path = file(former(**{"algorithm.kl_reduction": "microbatch"}))
    with pytest.raises(UserError, match=r"^algorithm.kl_reduction: microbatch"):
        load_config(str(path))
    assert load_config(str(path), to_evaluate=True) == load_config("tiny")


def test_an_algorithm_without_published_code_has_our_own_values():
    key = "algorithm.kl_when_ungated"
    assert compat_value(key, "official", "nft") == "all"
    assert compat_value(key, "official", "an algorithm of one's own") == "none"
    assert compat_value("sampling.same_latent", "paper", "an algorithm of one's own") is False


def test_paper_in_a_file_of_an_earlier_version_is_what_is_now_gardo(file):
    path = file(former())
    assert yaml.safe_load(path.read_text())["algorithm"]["compat"] == "paper"
    for config in (load_config(str(path)), load_config("tiny-nft", [path])):
        assert config.algorithm == load_config("tiny").algorithm
        assert config.algorithm.compat == "gardo"
    official = load_config("tiny", overrides=[COMPAT])
    assert load_config(str(file(former([COMPAT], **OFFICIAL)))) == official


def test_paper_in_a_file_of_this_version_or_a_users_is_the_paper(file):
    for data in (
        {"base": "tiny", "algorithm": {"compat": "paper"}},
        yaml.safe_load(to_yaml(load_config("tiny", overrides=[PAPER]))),
    ):
        config = load_config(str(file(data)))
        assert config.algorithm == load_config("tiny", overrides=[PAPER]).algorithm
        assert config.algorithm.gate_ties == "strict"
