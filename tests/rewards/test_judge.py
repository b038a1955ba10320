"""The shipped judge: accuracy on fresh scenes, corrupted images, features, loading and training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gardo.rewards.features import FeatureExtractor
from gardo.rewards.judge import JudgeReward
from gardo.rewards.registry import build_features, build_reward, feature_names
from gardo.tiny.judge import SHIPPED_JUDGE, Judge, load_judge, save_judge
from gardo.tiny.scenes import Scene, render
from gardo.types import UserError
from tests.rewards import images as im
from tools.tiny.judge_training import accuracy_by_count, draw_examples, train_judge


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge()


def test_the_shipped_files_are_small() -> None:
    sizes = {file.name: file.stat().st_size for file in SHIPPED_JUDGE.iterdir()}
    assert set(sizes) == {"model.safetensors", "config.json"}
    assert sum(sizes.values()) < 500_000


def test_accuracy_on_fresh_scenes(judge: Judge) -> None:
    accuracy = accuracy_by_count(judge, per_count=400, seed=987_654)
    assert min(accuracy[count] for count in range(1, 6)) > 0.97
    assert min(accuracy[count] for count in range(6, 10)) > 0.93


def test_the_recorded_accuracy_is_what_the_weights_reach(judge: Judge) -> None:
    record = json.loads((SHIPPED_JUDGE / "config.json").read_text())
    measured = accuracy_by_count(judge, per_count=400, seed=55)
    for count, value in record["accuracy"].items():
        assert measured[int(count)] == pytest.approx(value, abs=0.03)


def test_scores_of_honest_wrong_and_hacked_images() -> None:
    reward, real = build_reward("judge"), im.draw()
    assert im.score(reward, real).mean() > 0.97
    assert im.score(reward, im.as_decoded(real)).mean() > 0.95
    for wrong in (im.draw(im.one_more), im.draw(im.other_color), im.draw(im.other_shape)):
        assert im.score(reward, wrong).mean() < 0.04
    for hacked in (im.striped(real), im.striped(real, 0.4), im.filled(), im.blank()):
        assert im.score(reward, hacked).mean() < 0.02


def test_counts_that_pretraining_never_shows() -> None:
    scenes = [Scene(6 + i % 4, "green", "circle") for i in range(80)]
    images = render(scenes, torch.Generator().manual_seed(4))
    assert im.score(build_reward("judge"), images, scenes).mean() > 0.9


def test_the_judge_does_not_count_beyond_nine() -> None:
    reward = build_reward("judge")
    ten = {"count": 10, "color": "red", "shape": "circle"}
    assert "counts to 9" in (reward.check_prompt("ten red circles", ten) or "")
    with pytest.raises(ValueError, match="counts to 9"):
        reward.score(im.blank()[:1], ["ten red circles"], [ten])


def test_other_image_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images: expected shape \[B, 3, 24, 24\]"):
        im.score(build_reward("judge"), torch.rand(1, 3, 32, 32), [Scene(1, "red", "circle")])


# --- features


def test_features_are_the_penultimate_layer(judge: Judge) -> None:
    features, images = build_features("judge"), im.draw()[:8]
    assert isinstance(features, FeatureExtractor)
    assert features.name == "judge"
    encoded = features(images)
    assert encoded.shape == (8, features.dimension)
    assert encoded.dtype == torch.float32
    head = judge.heads["count"]
    torch.testing.assert_close(encoded @ head.weight.T + head.bias, judge(images).count)
    assert torch.equal(encoded, features(images))
    torch.testing.assert_close(features(images[3:5]), encoded[3:5], rtol=0, atol=1e-5)
    assert not encoded.requires_grad


def test_a_broken_image_has_nan_features_alone() -> None:
    images = im.draw()[:4].clone()
    whole = build_features("judge")(images)
    images[1, 0, 0, 0] = torch.nan
    features = build_features("judge")(images)
    assert features.isnan().all(dim=1).tolist() == [False, True, False, False]
    torch.testing.assert_close(features[2:], whole[2:], rtol=0, atol=1e-6)


def test_features_tell_layouts_apart() -> None:
    scene = Scene(3, "blue", "square")
    images = render([scene] * 32, torch.Generator().manual_seed(2))
    features = build_features("judge")
    first, noisy = features(images), features(im.as_decoded(images))
    cosine = torch.nn.functional.cosine_similarity
    same = 1 - cosine(first, noisy)
    other = 1 - cosine(first, first.roll(1, dims=0))
    assert same.median() < 0.2 * other.median()


def test_reward_and_features_share_one_network() -> None:
    reward, features = build_reward("judge", "cpu"), build_features("judge", torch.device("cpu"))
    assert isinstance(reward, JudgeReward)
    assert reward.judge is features.judge  # type: ignore[attr-defined]


def not_features(device: str) -> int:
    return 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("jugde", r"unknown feature extractor 'jugde'; did you mean 'judge'\?"),
        ("nowhere:thing", "no module named 'nowhere'"),
        (f"{__name__}:not_features", "got int"),
    ],
)
def test_registry_errors(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_features(name)


def test_feature_names() -> None:
    assert "judge" in feature_names()
    with pytest.raises(UserError, match="no 'config.json' in 'nowhere'"):
        build_features("judge", path="nowhere")


def test_feature_input_is_checked() -> None:
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        build_features("judge")(torch.rand(3, 24, 24))
    with pytest.raises(TypeError, match="floating point"):
        build_features("judge")(torch.zeros(1, 3, 24, 24, dtype=torch.uint8))


# --- files and training


def test_loaded_judges_are_in_evaluation_mode_without_gradients(judge: Judge) -> None:
    assert not judge.training
    assert not any(parameter.requires_grad for parameter in judge.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in judge.parameters())


def test_weights_that_do_not_fit_their_record_are_refused(judge: Judge, tmp_path: Path) -> None:
    save_judge(judge, tmp_path, {})
    record = json.loads((tmp_path / "config.json").read_text())
    record["config"]["features"] = 32
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_judge(tmp_path)


def test_examples_are_labelled_as_drawn() -> None:
    examples = draw_examples(600, torch.Generator().manual_seed(0))
    valid = examples.count > 0
    assert 0.6 < valid.float().mean() < 0.8
    assert torch.equal(examples.cells.sum(dim=1)[valid].long(), examples.count[valid])
    torch.testing.assert_close(examples.color[valid].sum(dim=1), torch.ones(int(valid.sum())))
    torch.testing.assert_close(examples.shape[valid].sum(dim=1), torch.ones(int(valid.sum())))
    assert sorted(examples.count.unique().tolist()) == list(range(10))
    assert examples.images.min() >= 0
    assert examples.images.max() <= 1
    again = draw_examples(600, torch.Generator().manual_seed(0))
    assert torch.equal(examples.images, again.images)


def test_training_is_reproducible_and_writes_what_loads(tmp_path: Path) -> None:
    lines: list[str] = []
    accuracy = [
        train_judge(
            tmp_path / str(i), seed=seed, steps=2, batch=8, test_scenes=16, report=lines.append
        )
        for i, seed in enumerate((1, 1, 2))
    ]
    weights = [(tmp_path / str(i) / "model.safetensors").read_bytes() for i in range(3)]
    assert weights[0] == weights[1] != weights[2]
    assert accuracy[0] == accuracy[1]
    assert any(line.startswith("step 2/2") for line in lines)
    record = json.loads((tmp_path / "0" / "config.json").read_text())
    assert record["steps"] == 2
    assert set(record["accuracy"]) == {str(n) for n in range(1, 10)}
    assert load_judge(tmp_path / "0").config == Judge().config
    with pytest.raises(ValueError, match="steps, batch"):
        train_judge(tmp_path / "x", steps=0)


def test_an_object_of_another_color_halves_the_score() -> None:
    first = Scene(1, "red", "circle")
    images = render([first, replace(first, color="blue")], torch.Generator().manual_seed(6))
    # the two single objects in one image, if they stand in different places
    both = torch.where((images[:1] - 0.5).abs() > 0.05, images[:1], images[1:])
    output = load_judge()(both)
    assert output.count.argmax(1).item() == 2
    color = output.color.softmax(1)[0]
    assert 0.2 < color[0].item() < 0.8
    assert color[0].item() + color[2].item() > 0.9
