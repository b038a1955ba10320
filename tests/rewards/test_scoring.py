"""Rewards by entry point and plain function, their checked outputs, missing scores, metrics."""

from __future__ import annotations

import importlib.metadata
import math
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from gardo.config import load_config
from gardo.rewards import registry
from gardo.rewards.base import Reward, RewardSpec, RewardUnavailable
from gardo.rewards.functions import FunctionReward, is_scoring_function
from gardo.rewards.outputs import concatenate, score_batch
from gardo.rewards.registry import build_reward, reward_names
from gardo.rewards.scoring import MissingScores, RewardSet, ScoreBook, reward_metrics
from gardo.types import Prompt, RewardOutput, UserError
from tests.rewards import toys
from tests.rewards.toys import toy

CPU = torch.device("cpu")


def images(count: int = 5) -> torch.Tensor:
    return torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(count))


def prompts(count: int = 5) -> list[Prompt]:
    return [Prompt("x" * i, {"add": i}) for i in range(count)]


def rewards_of(proxy: str, **overrides: str) -> RewardSet:
    settings = {"rewards.proxy": proxy, "rewards.aux": "count", "rewards.eval": "[]", **overrides}
    return RewardSet(load_config("tiny", overrides=list(settings.items())).rewards, CPU)


# --- plain functions


def test_a_plain_function_is_a_reward() -> None:
    rewards = rewards_of(toy("corner"))
    got = rewards.score([toy("corner")], images(), prompts())[toy("corner")]
    assert torch.equal(got, images()[:, 0, 0, 0])
    assert got.dtype == torch.float32


def test_it_may_return_a_list_and_gets_prompts_and_metadata() -> None:
    got = rewards_of(toy("length")).score_one(toy("length"), images(), prompts()).scores
    assert got.tolist() == [0.0, 2.0, 4.0, 6.0, 8.0]


def test_its_spec_and_details_are_used() -> None:
    reward = build_reward(toy("batch_size"))
    assert not reward.spec.higher_is_better
    output = score_batch("b", reward, images(19), ["a"] * 19, [{}] * 19)
    assert output.scores.tolist() == [8.0] * 16 + [3.0] * 3  # the preferred batch
    assert output.details["twice"].tolist() == [16.0] * 16 + [6.0] * 3


def scaled(images, prompts, metadata, *, factor, device_name="x"):
    return images.mean((1, 2, 3)) * factor


def test_parameters_of_the_recipe_are_keywords() -> None:
    name = f"{__name__}:scaled"
    got = rewards_of(name, **{"rewards.parameters": f"{{'{name}': {{factor: 2.0}}}}"})
    torch.testing.assert_close(
        got.score_one(name, images(), prompts()).scores, 2 * images().mean((1, 2, 3))
    )
    with pytest.raises(UserError, match="missing a required .*'factor'"):
        build_reward(name)
    with pytest.raises(UserError, match="unexpected keyword argument 'colour'"):
        build_reward(name, factor=1.0, colour=2)


class Callable3:
    def __call__(self, images, prompts, metadata):
        return images[:, 1, 0, 0]


CALLABLE = Callable3()
LAMBDA = lambda i, p, m, scale=1: i[:, 0, 0, 0]  # noqa: E731


def test_what_is_a_function_and_what_builds_a_reward() -> None:
    def factory(device, scale=1, shift=2):
        raise NotImplementedError

    def keywords(*args, **kwargs):
        raise NotImplementedError

    def two(images, prompts):
        raise NotImplementedError

    assert all(map(is_scoring_function, (toys.corner, CALLABLE, LAMBDA, scaled)))
    assert not any(map(is_scoring_function, (factory, keywords, two, Callable3, Reward, dict)))
    got = build_reward(f"{__name__}:CALLABLE").score(images(), ["a"] * 5, [{}] * 5).scores
    assert torch.equal(got, images()[:, 1, 0, 0])


def strange_spec(images, prompts, metadata):
    raise NotImplementedError


strange_spec.spec = {"higher_is_better": False}


def test_a_spec_of_another_type_is_refused() -> None:
    with pytest.raises(UserError, match="strange_spec': expected its attribute 'spec' to be a"):
        build_reward(f"{__name__}:strange_spec")


# --- what comes back


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([0.5, 1.0, 0.25]),
        torch.tensor([0.5, 1.0, 0.25], dtype=torch.float64),
        torch.tensor([0.5, 1.0, 0.25], dtype=torch.bfloat16),
        torch.tensor([0.5, 1.0, 0.25], requires_grad=True),
        [0.5, 1, 0.25],
        (0.5, 1.0, np.float32(0.25)),
        np.array([0.5, 1.0, 0.25]),
        np.array([0.5, 1.0, 0.25], dtype=np.float16),
    ],
)
def test_accepted_scores(value) -> None:
    got = FunctionReward("own", lambda i, p, m: value, {}).score(images(3), ["a"] * 3, [{}] * 3)
    assert got.scores.dtype == torch.float32
    assert got.scores.tolist() == [0.5, 1.0, 0.25]
    assert not got.scores.requires_grad


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(2), r"got shape \[2\]"),
        (torch.zeros(4), r"got shape \[4\]"),
        (torch.zeros(3, 1), r"got shape \[3, 1\]"),
        (torch.tensor(0.5), r"got shape \[\]"),
        (torch.zeros(3, dtype=torch.int64), "got a tensor of torch.int64"),
        (torch.zeros(3, dtype=torch.bool), "got a tensor of torch.bool"),
        ([0.5, 1.0], r"got shape \[2\]"),
        ([0.5, "1.0", 0.0], "got a list with '1.0'"),
        ([0.5, None, 0.0], "got a list with None"),
        ([True, False, True], "got a list with True"),
        ([[0.5], [1.0], [0.0]], r"got a list with \[0.5\]"),
        (np.zeros(3, dtype=np.int32), "got an array of int32"),
        (np.zeros((3, 1)), r"got shape \[3, 1\]"),
        (0.5, "got float"),
        (None, "got NoneType"),
        ("abc", "got str"),
        ({"scores": [1.0]}, "got dict"),
    ],
)
def test_wrong_scores_are_named(value, message: str) -> None:
    reward = FunctionReward("own", lambda i, p, m: value, {})
    with pytest.raises(UserError, match=f"reward 'own': expected 3 scores, .*{message}"):
        reward.score(images(3), ["a"] * 3, [{}] * 3)


class Wrong(Reward):
    def __init__(self, output) -> None:
        self.output = output

    def score(self, images, prompts, metadata):
        return self.output


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.zeros(3), "reward 'w': expected a RewardOutput, got Tensor"),
        (RewardOutput(torch.zeros(2)), r"reward 'w': expected 3 scores.*got shape \[2\]"),
        (RewardOutput(torch.zeros(3, dtype=torch.int8)), "reward 'w': .*torch.int8"),
        (RewardOutput(torch.zeros(3), {"x": torch.zeros(1)}), r"reward 'w/x': .*\[1\]"),
    ],
)
def test_wrong_outputs_of_reward_classes_are_named(output, message: str) -> None:
    with pytest.raises(UserError, match=message):
        score_batch("w", Wrong(output), images(3), ["a"] * 3, [{}] * 3)


def test_infinite_scores_are_missing() -> None:
    reward = FunctionReward("own", lambda i, p, m: [1.0, math.inf, -math.inf, math.nan], {})
    got = reward.score(images(4), ["a"] * 4, [{}] * 4).scores
    assert got.isnan().tolist() == [False, True, True, True]


def test_an_empty_batch() -> None:
    for name in (toy("corner"), toy("batch_size"), "count"):
        rewards = rewards_of(name, **({"rewards.aux": "clean"} if name == "count" else {}))
        got = rewards.score_one(name, images(4)[:0], []).scores
        assert got.shape == (0,)
        assert got.dtype == torch.float32


def test_outputs_join_with_gaps_in_the_details() -> None:
    joined = concatenate(
        [RewardOutput(torch.ones(2), {"x": torch.ones(2)}), RewardOutput(torch.zeros(1))]
    )
    assert joined.scores.tolist() == [1.0, 1.0, 0.0]
    assert joined.details["x"].isnan().tolist() == [False, False, True]


class Half(Reward):
    spec: ClassVar[RewardSpec] = RewardSpec(batch_size=2, dtype=torch.float16)
    seen: ClassVar[list[tuple[int, torch.dtype]]] = []

    def score(self, images, prompts, metadata):
        assert len(images) == len(prompts) == len(metadata)
        assert torch.is_inference_mode_enabled()
        self.seen.append((len(images), images.dtype))
        return RewardOutput(images[:, 0, 0, 0].float())


def test_the_preferred_batch_and_dtype() -> None:
    Half.seen.clear()
    got = score_batch("half", Half(), images(5), ["a"] * 5, [{}] * 5).scores
    assert Half.seen == [(2, torch.float16), (2, torch.float16), (1, torch.float16)]
    assert torch.equal(got, images(5)[:, 0, 0, 0].half().float())


# --- entry points


class FakeEntryPoints:
    def __init__(self, **targets: str) -> None:
        self.found = [
            importlib.metadata.EntryPoint(name, target, "gardo.rewards")
            for name, target in targets.items()
        ]

    def __call__(self, *, group: str):
        assert group == registry.ENTRY_POINTS == "gardo.rewards"
        return self.found


def test_entry_points_add_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    points = FakeEntryPoints(brightness=toy("corner"), count=toy("corner"), gone="no_such:thing")
    monkeypatch.setattr(importlib.metadata, "entry_points", points)
    assert {"brightness", "gone", "count"} <= set(reward_names())
    rewards = rewards_of("brightness")
    got = rewards.score_one("brightness", images(), prompts()).scores
    assert torch.equal(got, images()[:, 0, 0, 0])
    assert not isinstance(build_reward("count"), FunctionReward)  # built-in names stay theirs
    with pytest.raises(UserError, match="reward 'gone': no module named 'no_such'"):
        build_reward("gone")
    with pytest.raises(UserError, match="did you mean 'brightness'"):
        build_reward("brightnes")


def test_an_installed_package_brings_its_reward(tmp_path, monkeypatch) -> None:
    """The real machinery: a distribution on the import path with an entry point."""
    (tmp_path / "own_rewards.py").write_text("def dark(i, p, m):\n    return 1 - i[:, 0, 0, 0]\n")
    info = tmp_path / "own_rewards-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-rewards\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[gardo.rewards]\ndark = own_rewards:dark\n")
    monkeypatch.syspath_prepend(tmp_path)
    got = build_reward("dark").score(images(), ["a"] * 5, [{}] * 5).scores
    assert torch.equal(got, 1 - images()[:, 0, 0, 0])


# --- missing scores and metrics


def test_too_many_missing_scores_stop_the_run() -> None:
    rewards = rewards_of(toy("corner"), **{"rewards.max_missing_share": "0.25"})
    scores = torch.arange(8.0)
    scores[:2] = torch.nan
    rewards.check_missing(toy("corner"), scores)  # exactly the share
    scores[2] = torch.nan
    with pytest.raises(MissingScores) as caught:
        rewards.check_missing(toy("corner"), scores)
    message = str(caught.value)
    assert f"reward '{toy('corner')}'" in message
    assert "3 of 8 images (37.5%)" in message
    assert "allows 25.0%" in message
    assert isinstance(caught.value, RewardUnavailable)
    assert isinstance(caught.value, UserError)
    rewards.check_missing(toy("corner"), torch.zeros(0))


@pytest.mark.parametrize("share", ["-0.1", "1.1", "much"])
def test_the_share_is_a_fraction(share: str) -> None:
    with pytest.raises(UserError, match="max_missing_share"):
        load_config("tiny", overrides=[("rewards.max_missing_share", share)])


def test_the_book_keeps_order_and_times() -> None:
    book = ScoreBook()
    book.add({"a": torch.tensor([1.0, 2.0])}, torch.ones(2, 3), {"a": 0.5})
    book.add({"a": torch.tensor([3.0])}, torch.zeros(1, 3), {"a": 0.1})
    assert book.scores("a").tolist() == [1.0, 2.0, 3.0]
    assert book.features().shape == (3, 3)
    assert book.seconds_per_image("a") == pytest.approx(0.2)
    assert book.seconds_per_image("b") is None
    book.add({"b": RewardOutput(torch.zeros(1), {"x": torch.ones(1)})}, None)
    assert book.seconds_per_image("b") is None
    book.add({"b": torch.zeros(2)}, None)  # as of a server that could not score
    details = book.details()
    assert list(details) == ["b/x"]
    torch.testing.assert_close(
        details["b/x"], torch.tensor([1.0, torch.nan, torch.nan]), equal_nan=True
    )


def test_metrics_of_a_reward() -> None:
    scores = torch.tensor([1.0, 3.0, torch.nan, torch.nan])
    assert reward_metrics("a", scores, 0.25) == {
        "reward/a/mean": 2.0,
        "reward/a/std": 1.0,
        "reward/a/missing": 0.5,
        "time/reward/a": 0.25,
    }
    nothing = reward_metrics("a", torch.full((2,), torch.nan))
    assert math.isnan(nothing["reward/a/mean"])
    assert nothing["reward/a/missing"] == 1.0
    assert "time/reward/a" not in nothing


def test_parameters_reach_the_feature_extractor(tmp_path: Path) -> None:
    missing = str(tmp_path / "judge")
    with pytest.raises(UserError, match="judge"):
        rewards_of(
            "clean",
            **{
                "rewards.features": "judge",
                "rewards.parameters": f"{{judge: {{path: {missing}}}}}",
            },
        )
    with pytest.raises(UserError, match="rewards.parameters.judge: .*size"):
        rewards_of(
            "clean", **{"rewards.features": "judge", "rewards.parameters": "{judge: {size: 3}}"}
        )
