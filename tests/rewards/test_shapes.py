"""The rule-based rewards: honest scenes, wrong ones, and the hack that the proxy invites."""

from __future__ import annotations

import math

import pytest
import torch

from gardo.rewards.objects import MIN_AREA, color_projection
from gardo.rewards.registry import build_reward
from gardo.rewards.shapes import MEAN_AREA
from gardo.tiny.scenes import COLORS, Scene
from gardo.types import UserError
from tests.rewards import images as im

RULES = ("count", "shape_fit", "clean", "strict_count", "artifact")


@pytest.fixture(scope="module")
def real() -> torch.Tensor:
    return im.draw()


def blocks(*corners: tuple[int, int], size: int = 4, color: str = "red") -> torch.Tensor:
    """One grey image with hard-edged squares of ``size`` pixels at the corners (y, x)."""
    image = torch.full((1, 3, 24, 24), 0.5)
    for y, x in corners:
        image[0, :, y : y + size, x : x + size] = torch.tensor(COLORS[color])[:, None, None]
    return image


# --- single numbers, computed by hand


def test_count_is_agreement_plus_weighted_paint() -> None:
    image = blocks((2, 2), (12, 12))  # 2 components, 32 of 576 pixels painted
    for count, agreement in ((1, 1 / 2), (2, 1.0), (3, 1 / 2), (5, 1 / 4)):
        for weight in (0.0, 3.0, 10.0):
            got = im.score(
                build_reward("count", color_weight=weight), image, [Scene(count, "red", "square")]
            )
            assert got.item() == pytest.approx(agreement + weight * 32 / 576, abs=1e-6)


def test_count_may_pay_for_more_paint_than_the_objects_need() -> None:
    image = blocks((2, 2), (12, 12))
    for count in (1, 2, 5):
        scene = [Scene(count, "red", "square")]
        plain = im.score(build_reward("count", color_weight=0.0), image, scene)
        paid = im.score(build_reward("count", color_weight=0.0, excess_weight=0.25), image, scene)
        # 32 pixels, where the renderer's objects have 22 on average
        assert (paid - plain).item() == pytest.approx(0.25 * (32 / (22 * count)) ** 2, abs=1e-6)
    for name in ("color_weight", "excess_weight"):
        with pytest.raises(UserError, match=f"{name}: expected a number >= 0, got -1"):
            build_reward("count", **{name: -1.0})


def test_the_mean_area_is_that_of_the_renderers_objects(real: torch.Tensor) -> None:
    scenes = im.SCENES
    coverage = color_projection(real, torch.tensor([COLORS[s.color] for s in scenes]))
    each = coverage.clamp(min=0).sum((1, 2)) / torch.tensor([float(s.count) for s in scenes])
    assert each.mean().item() == pytest.approx(MEAN_AREA, rel=0.03)


def test_count_ignores_specks() -> None:
    reward = build_reward("count", color_weight=0.0)
    image = blocks((2, 2))
    red = torch.tensor(COLORS["red"])[:, None]
    image[0, :, 20, : MIN_AREA - 1] = red
    assert im.score(reward, image, [Scene(1, "red", "square")]).item() == 1
    image[0, :, 20, :MIN_AREA] = red
    assert im.score(reward, image, [Scene(1, "red", "square")]).item() == 0.5


def test_count_never_goes_below_zero_for_the_opposite_colour() -> None:
    opposite = torch.tensor([0.1, 0.85, 0.85])[None, :, None, None].expand(1, 3, 24, 24)
    got = im.score(build_reward("count"), opposite, [Scene(3, "red", "circle")])
    assert got.item() == pytest.approx(0.25)  # no component of three, and no negative paint


def test_shape_fit_of_squares() -> None:
    # a pixel-aligned square fits the ideal square of its area exactly
    fit = build_reward("shape_fit")
    assert im.score(
        fit, blocks((3, 3), (12, 12)), [Scene(2, "red", "square")]
    ).item() == pytest.approx(1, abs=1e-3)
    # the disc of area 16 (radius 2.2568) at the centre of a 4 x 4 square: the corner pixels, 2.1213
    # away, are covered by 0.6355, the other twelve (at most 1.5811 away) fully
    common = 12 + 4 * (4 / math.sqrt(math.pi) - math.sqrt(4.5) + 0.5)
    expected = common / (32 - common)
    got = im.score(fit, blocks((3, 3)), [Scene(1, "red", "circle")]).item()
    assert got == pytest.approx(expected, abs=1e-3)


def test_clean_is_the_exponential_of_the_mean_distances() -> None:
    image = blocks((10, 10))
    # background: more than two pixels from the square, 576 - 64 pixels... 8 x 8 stay out
    image[0, 0, 0, :16] += 0.3  # 16 background pixels, 0.3 from grey
    expected = math.exp(-10 * 16 * 0.3 / (576 - 64))
    got = im.score(build_reward("clean"), image, [Scene(1, "red", "square")]).item()
    assert got == pytest.approx(expected, abs=1e-5)
    # impurity: a quarter of the square shifted by 0.1 across the line from grey to red
    direction = torch.tensor([0.0, 1.0, -1.0]) / math.sqrt(2)  # perpendicular: red's g equals its b
    image = blocks((10, 10))
    image[0, :, 10, 10:14] += 0.1 * direction[:, None]
    expected = math.exp(-10 * 4 * 0.1 / 36)  # 6 x 6 pixels are the square and its edge
    got = im.score(build_reward("clean"), image, [Scene(1, "red", "square")]).item()
    assert got == pytest.approx(expected, abs=1e-5)


def test_artifact_of_a_single_bright_pixel() -> None:
    image = blocks((16, 16))
    image[0, :, 4, 4] += 0.09
    # itself 0.08 above its neighbourhood's mean, the eight around it 0.01 below theirs
    energy = (0.08**2 + 8 * 0.01**2) / (576 - 64)
    got = im.score(build_reward("artifact"), image, [Scene(1, "red", "square")]).item()
    assert got == pytest.approx(math.sqrt(energy), rel=1e-4)


def test_artifact_measures_faint_noise_by_its_deviation() -> None:
    noise = torch.randn(len(im.SCENES), 3, 24, 24, generator=torch.Generator().manual_seed(0))
    got = im.score(build_reward("artifact"), im.blank() + 0.05 * noise).mean().item()
    assert got == pytest.approx(0.05 * math.sqrt(8 / 9), rel=0.03)  # the mean takes a ninth


# --- the whole grammar


def test_honest_scenes_score_near_the_top(real: torch.Tensor) -> None:
    assert im.score(build_reward("count", color_weight=0.0), real).eq(1).all()
    assert im.score(build_reward("shape_fit"), real).min() > 0.97
    assert im.score(build_reward("clean"), real).min() > 0.99
    assert im.score(build_reward("strict_count"), real).mean() == 1
    assert im.score(build_reward("artifact"), real).max() < 0.005


def test_honest_scenes_as_a_decoder_draws_them(real: torch.Tensor) -> None:
    decoded = im.as_decoded(real)
    assert im.score(build_reward("count", color_weight=0.0), decoded).mean() > 0.99
    assert im.score(build_reward("shape_fit"), decoded).min() > 0.8
    assert im.score(build_reward("clean"), decoded).min() > 0.6
    assert im.score(build_reward("strict_count"), decoded).mean() > 0.97
    assert im.score(build_reward("artifact"), decoded).max() < 0.02


def test_wrong_count(real: torch.Tensor) -> None:
    wrong = im.draw(im.one_more)
    honest, scored = (im.score(build_reward("count"), x) for x in (real, wrong))
    assert (scored - honest).max() < -0.3  # the paint of one more object does not make up for it
    assert im.score(build_reward("strict_count"), wrong).sum() == 0


def test_wrong_color() -> None:
    wrong = im.draw(im.other_color)
    assert im.score(build_reward("count"), wrong).max() <= 0.5 + 3 * 0.15
    for name in ("shape_fit", "clean", "strict_count"):
        assert im.score(build_reward(name), wrong).sum() == 0


def test_wrong_shape(real: torch.Tensor) -> None:
    wrong = im.draw(im.other_shape)
    assert im.score(build_reward("count", color_weight=0.0), wrong).eq(1).all()  # proxy is blind
    fit = build_reward("shape_fit")
    assert im.score(fit, wrong).max() < im.score(fit, real).min() - 0.05
    assert im.score(build_reward("strict_count"), wrong).sum() == 0
    assert im.score(build_reward("strict_count"), im.as_decoded(wrong)).mean() < 0.01


def test_a_second_color_or_a_stray_object_is_not_strict() -> None:
    scene = [Scene(1, "red", "square")]
    strict, image = build_reward("strict_count"), blocks((3, 3))
    assert im.score(strict, image, scene).item() == 1
    image[:, :, 15:19, 15:19] = torch.tensor(COLORS["blue"])[:, None, None]
    assert im.score(strict, image, scene).item() == 0


def test_strict_refuses_each_fault_alone() -> None:
    strict = build_reward("strict_count")
    one = [Scene(1, "red", "square")]
    assert im.score(strict, blocks((9, 9)), one).item() == 1
    assert im.score(strict, blocks((9, 9), size=2), one).item() == 0  # too small
    assert im.score(strict, blocks((9, 9), size=8), one).item() == 0  # too large
    red, grey = torch.tensor(COLORS["red"])[:, None, None], 0.5
    scrap = blocks((9, 9))
    scrap[0, :, 9:12, 14] = red[..., 0]  # three pixels, too near to be background
    assert im.score(strict, scrap, one).item() == 0
    oblong = torch.full((2, 3, 24, 24), grey)
    oblong[:, :, 9:12, 9:15] = red
    assert im.score(strict, oblong, [*one, Scene(1, "red", "circle")]).sum() == 0
    faded, impure, stray = (blocks((9, 9)) for _ in range(3))
    faded[0, :, 9:13, 9:13] = grey + 0.6 * (red - grey)
    assert im.score(strict, faded, one).item() == 0
    impure[0, 1:, 9:13, 9:13] += torch.tensor([0.3, -0.1])[:, None, None]
    assert im.score(strict, impure, one).item() == 0
    stray[0, 1, 1, 1:3] += 0.15
    assert im.score(strict, stray, one).item() == 1  # two stray pixels are forgiven
    stray[0, 1, 1, 3] += 0.15
    assert im.score(strict, stray, one).item() == 0


def test_strict_refuses_one_wrong_shape_among_right_ones() -> None:
    nine = [Scene(9, "red", "square"), Scene(9, "red", "circle")]  # every cell of 8 x 8 is filled
    squares, circles = im.render(nine, torch.Generator().manual_seed(5))
    strict = build_reward("strict_count")
    assert im.score(strict, squares[None], nine[:1]).item() == 1
    squares[:, :8, :8] = circles[:, :8, :8]
    assert im.score(build_reward("count", color_weight=0.0), squares[None], nine[:1]).item() == 1
    assert im.score(strict, squares[None], nine[:1]).item() == 0


def test_bars_are_no_objects_but_dirt() -> None:
    bar = torch.full((1, 3, 24, 24), 0.5)
    bar[0, :, 10:12, 6:12] = torch.tensor(COLORS["red"])[:, None, None]  # 2 x 6 pixels
    scene = [Scene(1, "red", "square")]
    assert im.score(build_reward("clean"), bar, scene).item() == 0
    assert im.score(build_reward("count"), bar, scene).item() > 1


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_stripes_raise_the_proxy_and_lower_everything_else(
    real: torch.Tensor, strength: float
) -> None:
    hacked = im.striped(real, strength)
    before = {name: im.score(build_reward(name), real).mean().item() for name in RULES}
    after = {name: im.score(build_reward(name), hacked).mean().item() for name in RULES}
    assert after["count"] > before["count"] + 0.3
    assert after["shape_fit"] < before["shape_fit"] - 0.1
    assert after["clean"] < before["clean"] - 0.5
    assert after["strict_count"] == 0
    assert after["artifact"] > before["artifact"] + 0.03


def test_paint_alone_pays_only_the_proxy(real: torch.Tensor) -> None:
    full = im.filled()
    assert im.score(build_reward("count"), full).min() > im.score(build_reward("count"), real).max()
    for name in ("shape_fit", "clean", "strict_count"):
        assert im.score(build_reward(name), full).sum() == 0


def test_blank_images_earn_almost_nothing() -> None:
    blank = im.blank()
    counts = torch.tensor([float(scene.count) for scene in im.SCENES])
    torch.testing.assert_close(im.score(build_reward("count"), blank), 1 / (1 + counts))
    for name in ("shape_fit", "clean", "strict_count", "artifact"):
        assert im.score(build_reward(name), blank).sum() == 0


def test_the_proxy_varies_within_a_group_of_honest_images() -> None:
    scenes = [Scene(3, "green", "circle")] * 16
    images = torch.cat(
        [im.render([s], torch.Generator().manual_seed(i)) for i, s in enumerate(scenes)]
    )
    scores = im.score(build_reward("count"), images, scenes)
    assert scores.std() > 0.01
    assert scores.unique().numel() == 16
