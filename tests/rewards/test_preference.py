"""The shipped preference model: accuracy, graded sight, loading, and its training."""

from __future__ import annotations

import itertools
import json
import math
import socket
from pathlib import Path

import pytest
import torch

from gardo.rewards.preference import PreferenceReward
from gardo.rewards.registry import build_reward
from gardo.tiny.networks import load_weights, read_record
from gardo.tiny.preference import (
    SHIPPED_PREFERENCE,
    PreferenceModel,
    load_preference,
    save_preference,
)
from gardo.tiny.scenes import Scene, render
from gardo.types import UserError
from tests.rewards import images as im
from tools.tiny.preference_data import (
    FIRST,
    OVERPAINTED,
    draw_comparisons,
    draw_coverage,
    overpaint,
)
from tools.tiny.preference_training import SIGHTS, measure, train_preference


@pytest.fixture(scope="module")
def model() -> PreferenceModel:
    return load_preference()


@pytest.fixture(scope="module")
def record() -> dict:
    return read_record("preference", SHIPPED_PREFERENCE)


def win_rates(sight: float) -> dict[str, float]:
    """How often rendered scenes beat over-painted ones, by degree."""
    reward, generator = build_reward("preference", sight=sight), torch.Generator().manual_seed(81)
    clean = im.score(reward, render(im.SCENES, generator))
    return {
        degree: (clean > im.score(reward, overpaint(im.SCENES, degree, generator))).float().mean()
        for degree in OVERPAINTED
    }


def test_the_shipped_files_are_small() -> None:
    sizes = {file.name: file.stat().st_size for file in SHIPPED_PREFERENCE.iterdir()}
    assert set(sizes) == {"model.safetensors", "config.json"}
    assert sum(sizes.values()) < 200_000


@pytest.mark.parametrize("sight", [-0.01, 1.01, math.nan, math.inf])
def test_sight_is_between_blind_and_sharp(sight: float) -> None:
    with pytest.raises(UserError, match="reward 'preference': sight: expected a number from 0 to"):
        build_reward("preference", sight=sight)


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(UserError, match="preference: no 'config.json' in 'nowhere'"):
        build_reward("preference", path="nowhere")


def test_more_sight_punishes_too_much_paint_more_often() -> None:
    rates = [sum(win_rates(sight).values()) / len(OVERPAINTED) for sight in SIGHTS]
    assert rates == sorted(set(rates))


def test_the_blind_like_paint_and_the_sharp_do_not() -> None:
    blind, sharp = win_rates(0.0), win_rates(1.0)
    assert all(rate <= 0.5 for rate in blind.values())
    assert sharp["area x 2"] > 0.9
    assert all(sharp[degree] > 0.98 for degree in ("area x 3", "filled half", "filled"))


def test_the_sharp_order_degrees(model: PreferenceModel) -> None:
    generator = torch.Generator().manual_seed(4)
    scores = [model(render(im.SCENES, generator), im.SCENES)[:, 1].mean()]
    scores += [
        model(overpaint(im.SCENES, d, generator), im.SCENES)[:, 1].mean() for d in OVERPAINTED
    ]
    assert all(better > worse for better, worse in itertools.pairwise(scores))


def test_only_the_sharp_count(model: PreferenceModel) -> None:
    right, wrong = model(im.draw(), im.SCENES), model(im.draw(im.one_more), im.SCENES)
    blind, sharp = (right > wrong).float().mean(dim=0)
    assert 0.3 < blind < 0.6
    assert sharp > 0.8


def test_both_know_color(model: PreferenceModel) -> None:
    right, wrong = model(im.draw(), im.SCENES), model(im.draw(im.other_color), im.SCENES)
    assert (right > wrong).float().mean(dim=0).min() > 0.98


def test_sight_mixes_the_heads(model: PreferenceModel) -> None:
    images = im.as_decoded(im.draw())
    heads = model(images, im.SCENES)
    for sight in (0, 0.3, 1):
        scores = im.score(PreferenceReward(sight=sight), images)
        mixed = heads[:, 0] * (1 - sight) + heads[:, 1] * sight
        torch.testing.assert_close(scores, mixed, rtol=0, atol=1e-5)


def test_rendered_scenes_have_mean_0_and_variance_1(model: PreferenceModel) -> None:
    scores = model(im.as_decoded(im.draw()), im.SCENES)
    assert scores.mean(dim=0).abs().max() < 1
    assert ((scores.std(dim=0) > 0.5) & (scores.std(dim=0) < 2)).all()


def test_it_does_not_count_beyond_nine() -> None:
    ten = {"count": 10, "color": "red", "shape": "circle"}
    problem = build_reward("preference").check_prompt("ten red circles", ten)
    assert "the preference model counts to 9" in (problem or "")


def test_other_image_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images: expected shape \[B, 3, 24, 24\]"):
        im.score(build_reward("preference"), torch.rand(1, 3, 32, 32), [Scene(1, "red", "circle")])


def test_it_loads_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    loaded = load_preference()
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in loaded.parameters())


def test_the_recorded_figures_are_what_the_weights_reach(
    model: PreferenceModel, record: dict
) -> None:
    measured = measure(model, 300, seed=77)
    for head in ("blind", "sharp"):
        assert measured["accuracy"][head] == pytest.approx(record["accuracy"][head], abs=0.03)
        assert measured["flipped"][head] == pytest.approx(0.2, abs=0.05)
    for sight, rates in measured["sight"].items():
        assert rates == pytest.approx(record["sight"][sight], abs=0.08)


# --- data and training


def test_comparisons_are_reproducible_and_noisy() -> None:
    first, again = (draw_comparisons(200, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.preferred, again.preferred)
    assert first.better.shape == (200, len(FIRST), 2)
    assert first.images.min() >= 0
    assert first.images.max() <= 1
    wrong = (first.preferred != (first.better > 0)).float().mean(dim=(0, 1))
    assert ((wrong > 0.15) & (wrong < 0.25)).all()


def test_objects_are_drawn_as_rendered_and_merge_as_they_grow() -> None:
    scenes = [Scene(1 + i % 9, "blue", "circle" if i % 2 else "square") for i in range(360)]
    count = torch.tensor([scene.count for scene in scenes])
    square = torch.tensor([scene.shape == "square" for scene in scenes])
    blue = render(scenes, torch.Generator().manual_seed(0))[:, 2]
    rendered = (blue - 0.5).mean() / 0.4

    def area(growth: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return draw_coverage(count, square, torch.full((360,), growth), generator).mean()

    torch.testing.assert_close(area(1.0), rendered, rtol=1e-4, atol=0)
    assert 1.9 < area(2**0.5) / area(1.0) < 2.1
    assert area(4.0) < 8 * area(1.0)


def test_training_is_reproducible_and_writes_what_loads(tmp_path: Path) -> None:
    lines: list[str] = []
    measured = [
        train_preference(
            tmp_path / str(i), seed=seed, steps=2, prompts=4, test_images=18, report=lines.append
        )
        for i, seed in enumerate((1, 1, 2))
    ]
    weights = [(tmp_path / str(i) / "model.safetensors").read_bytes() for i in range(3)]
    assert weights[0] == weights[1] != weights[2]
    assert measured[0] == measured[1]
    assert any(line.startswith("step 2/2") for line in lines)
    written = json.loads((tmp_path / "0" / "config.json").read_text())
    assert written["steps"] == 2
    assert set(written["sight"]) == {str(sight) for sight in SIGHTS}
    assert load_preference(tmp_path / "0").config == PreferenceModel().config
    with pytest.raises(ValueError, match="steps, prompts"):
        train_preference(tmp_path / "x", steps=0)


def test_weights_that_do_not_fit_are_refused(model: PreferenceModel, tmp_path: Path) -> None:
    save_preference(model, tmp_path, {})
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_weights(PreferenceModel(type(model.config)(features=8)), tmp_path)
