"""What every reward of the embedded task promises: batches, metadata, bad input, the registry."""

from __future__ import annotations

import pytest
import torch

from gardo.rewards.base import Reward
from gardo.rewards.registry import build_reward, reward_names
from gardo.tiny.scenes import Scene
from gardo.types import UserError
from tests.rewards import images as im

NAMES = ("count", "shape_fit", "clean", "strict_count", "artifact", "judge", "preference")


@pytest.fixture(scope="module", params=NAMES)
def reward(request: pytest.FixtureRequest) -> Reward:
    return build_reward(request.param)


@pytest.fixture(scope="module")
def varied() -> torch.Tensor:
    """Honest, hacked and half-hacked images in turn."""
    real = im.draw()
    images = torch.stack([real, im.striped(real), im.striped(real, 0.2), im.as_decoded(real)])
    return images[torch.arange(len(real)) % 4, torch.arange(len(real))]


def test_all_rewards_of_the_task_are_registered() -> None:
    assert set(NAMES) <= set(reward_names())


def test_scores_are_float32_within_the_declared_range(reward: Reward, varied: torch.Tensor) -> None:
    output = reward.score(varied, [s.prompt for s in im.SCENES], [s.metadata for s in im.SCENES])
    assert output.scores.shape == (len(varied),)
    assert output.scores.dtype == torch.float32
    low, high = reward.spec.value_range
    assert low is None or output.scores.min() >= low
    assert high is None or output.scores.max() <= high


def test_a_sample_scores_the_same_in_any_batch(reward: Reward, varied: torch.Tensor) -> None:
    together = im.score(reward, varied)
    for size in (1, 7):
        parts = [
            im.score(reward, varied[i : i + size], im.SCENES[i : i + size])
            for i in range(0, 42, size)
        ]
        torch.testing.assert_close(torch.cat(parts), together[:42], rtol=0, atol=1e-5)
    order = torch.randperm(len(varied), generator=torch.Generator().manual_seed(1))
    shuffled = im.score(reward, varied[order], [im.SCENES[i] for i in order.tolist()])
    torch.testing.assert_close(shuffled, together[order], rtol=0, atol=1e-5)


def test_scoring_twice_gives_the_same_bits(reward: Reward, varied: torch.Tensor) -> None:
    assert torch.equal(im.score(reward, varied), im.score(reward, varied))


def test_only_the_broken_image_scores_nan(reward: Reward, varied: torch.Tensor) -> None:
    clean = im.score(reward, varied[:12], im.SCENES[:12])
    broken = varied[:12].clone()
    broken[2, 0, 5, 5] = torch.nan
    broken[7] = torch.inf
    scores = im.score(reward, broken, im.SCENES[:12])
    assert scores.isnan().nonzero().flatten().tolist() == [2, 7]
    rest = ~scores.isnan()
    torch.testing.assert_close(scores[rest], clean[rest], rtol=0, atol=1e-6)


def test_inference_mode_half_precision_and_empty_batches(
    reward: Reward, varied: torch.Tensor
) -> None:
    with torch.inference_mode():
        full = im.score(reward, varied[:8].clone(), im.SCENES[:8])
        half = im.score(reward, im.draw()[:8].half(), im.SCENES[:8])
    assert not full.requires_grad
    assert half.dtype == torch.float32
    torch.testing.assert_close(
        half, im.score(reward, im.draw()[:8], im.SCENES[:8]), rtol=0, atol=0.02
    )
    assert im.score(reward, varied[:0], []).shape == (0,)


def test_the_prompt_is_parsed_where_metadata_is_missing(
    reward: Reward, varied: torch.Tensor
) -> None:
    prompts = [scene.prompt for scene in im.SCENES]
    parsed = reward.score(varied, prompts, [{}] * len(prompts)).scores
    assert torch.equal(parsed, im.score(reward, varied))
    # metadata decides where both are there
    scene = Scene(2, "blue", "square")
    told = reward.score(varied[:1], ["two things"], [scene.metadata]).scores
    assert torch.equal(told, im.score(reward, varied[:1], [scene]))


def test_prompts_that_cannot_be_judged_are_named(reward: Reward) -> None:
    assert reward.check_prompt("three red circles", {}) is None
    assert reward.check_prompt("anything", {"count": 3, "color": "red", "shape": "circle"}) is None
    assert "a photo of a cat" in (reward.check_prompt("a photo of a cat", {}) or "")
    bad = (
        ({"count": 0, "color": "red", "shape": "circle"}, "count"),
        ({"count": True, "color": "red", "shape": "circle"}, "count"),
        ({"count": 2, "color": "pink", "shape": "circle"}, "color"),
        ({"count": 2, "color": "red", "shape": "star"}, "shape"),
    )
    for metadata, word in bad:
        assert word in (reward.check_prompt("x", metadata) or "")
    with pytest.raises(ValueError, match="a photo of a cat"):
        reward.score(im.blank()[:1], ["a photo of a cat"], [{}])


def test_malformed_batches_are_refused(reward: Reward) -> None:
    prompt, record = ["one red circle"], [{}]
    with pytest.raises(ValueError, match=r"images: expected shape \[B, 3, H, W\]"):
        reward.score(torch.rand(3, 24, 24), prompt, record)
    with pytest.raises(ValueError, match="images: expected shape"):
        reward.score(torch.rand(1, 4, 24, 24), prompt, record)
    with pytest.raises(TypeError, match="floating point"):
        reward.score(torch.zeros(1, 3, 24, 24, dtype=torch.uint8), prompt, record)
    with pytest.raises(ValueError, match="prompts: expected 2"):
        reward.score(torch.rand(2, 3, 24, 24), prompt, record)
    with pytest.raises(ValueError):
        reward.score(torch.rand(1, 3, 24, 24), prompt, [])


def test_directions() -> None:
    assert not build_reward("artifact").spec.higher_is_better
    assert all(build_reward(name).spec.higher_is_better for name in NAMES if name != "artifact")


# --- the registry


class OwnReward(Reward):
    def __init__(self, device: str, scale: float = 1.0) -> None:
        self.scale = scale

    def score(self, images, prompts, metadata):  # type: ignore[no-untyped-def]
        raise NotImplementedError


def no_reward(device: str) -> str:
    return "nothing"


NOT_CALLABLE = 3


def test_a_python_path_is_built_with_its_parameters() -> None:
    built = build_reward(f"{__name__}:OwnReward", scale=2.0)
    assert isinstance(built, OwnReward)
    assert built.scale == 2.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("coumt", r"unknown reward 'coumt'; did you mean 'count'\?"),
        ("zzz", r"unknown reward 'zzz' \(built in: "),
        ("module:", "unknown reward 'module:'"),
        ("no_such_module:thing", "no module named 'no_such_module'"),
        ("gardo.no_such_part:thing", "no module named 'gardo.no_such_part'"),
        ("gardo.rewards.shapes:Nothing", "has no 'Nothing'"),
        (f"{__name__}:NOT_CALLABLE", "cannot call its 'NOT_CALLABLE'"),
        (f"{__name__}:no_reward", "expected a gardo.rewards.base.Reward, got str"),
    ],
)
def test_registry_errors(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_reward(name)


def test_a_missing_dependency_of_a_users_module_is_not_blamed_on_the_user(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_reward_module.py").write_text("import dependency_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="dependency_that_is_missing"):
        build_reward("own_reward_module:thing")


def test_refused_parameters_are_user_errors() -> None:
    with pytest.raises(UserError, match="reward 'count': color_weight: expected a number >= 0"):
        build_reward("count", color_weight=-1.0)
    with pytest.raises(UserError, match="judge: no 'config.json' in 'nowhere'"):
        build_reward("judge", path="nowhere")
