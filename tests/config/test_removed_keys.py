"""Keys of earlier versions: refused with what replaces them, dropped where they change nothing."""

from __future__ import annotations

import pytest
import yaml

from gardo.config import load_config, to_yaml
from gardo.types import UserError

BOUND = "sampling.max_ratio_deviation"


PAPER = {
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
    for dotted, value in {BOUND: 1e-3, "health.ratio": 0.01, **PAPER, **values}.items():
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
    assert config.health.ratio == 0.01
    assert load_config("tiny", [path]) == config
    assert BOUND.split(".")[1] not in to_yaml(config)
    for value in (0.05, None):
        path = file(former(**{BOUND: value}))
        for recipe, files in ((str(path), []), ("tiny", [path])):
            with pytest.raises(UserError, match=f"{BOUND}: renamed to health.ratio"):
                load_config(recipe, files)


COMPAT = ("algorithm.compat", "official")
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
    expected = load_config("tiny", overrides=[*overrides, ("health.ratio", "0.01")])
    assert load_config("tiny", [path]) == load_config(str(path), of_run=True) == expected


@pytest.mark.parametrize(
    ("overrides", "values", "refused"),
    [
        ([], {"algorithm.kl_when_ungated": "all"}, "kl_when_ungated"),
        ([], {"algorithm.gate.ties": "ordinal"}, "gate.ties"),
        ([], {"algorithm.reference.judged_by": "update"}, "reference.judged_by"),
        ([MODE], {"algorithm.gate.ties": "half"}, "gate.ties"),
        ([COMPAT], {**OFFICIAL, "algorithm.gate.ties": "half"}, "gate.ties"),
        ([COMPAT, *NFT], OFFICIAL, "kl_when_ungated"),
    ],
)
def test_toggles_of_a_file_that_deviate_are_refused(file, overrides, values, refused):
    path = file(former(overrides, **values))
    for of_run in (False, True):
        with pytest.raises(UserError) as caught:
            load_config(str(path), of_run=of_run)
        assert str(caught.value) == f"algorithm.{refused}: gone; algorithm.compat official sets it"


def test_a_wrong_compat_of_a_file_is_what_is_named(file):
    with pytest.raises(UserError, match=r"algorithm.compat: expected 'paper' or 'official'"):
        load_config(str(file(former(**{"algorithm.compat": "oficial"}))))


def test_compat_on_top_of_a_file_with_toggles_is_refused(file):
    with pytest.raises(UserError, match=r"algorithm.gate.ties: gone; algorithm.compat official"):
        load_config(str(file(former())), overrides=[COMPAT])


@pytest.mark.parametrize(
    ("bound", "alarm", "ratio"),
    [
        (1e-3, 0.01, 0.01),
        (0.05, 0.01, 0.05),
        (None, 0.01, None),
        (1e-3, None, None),
        (None, None, None),
    ],
)
def test_a_run_of_an_earlier_version_goes_on_with_the_laxer_bound(file, bound, alarm, ratio):
    path = file(former(**{BOUND: bound, "health.ratio": alarm}))
    assert load_config(str(path), of_run=True).health.ratio == ratio
    typed = load_config(str(path), overrides=[("health.ratio", "1e-4")], of_run=True)
    assert typed.health.ratio == 1e-4
