"""Colours: crops against Pillow's, features and choices against transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel

from gardo.data.coco import GENEVAL_COLORS
from gardo.rewards.backbones import ClipBackbone, clip_backbone
from gardo.rewards.geneval.colors import TEMPLATES, ColorClassifier, crop_object
from gardo.rewards.geneval.rules import Detection
from tests.rewards.tiny_models import SIDE, clip_folder, clip_words, images, pictures
from tools.tiny.vocabulary import clip_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def classifier(folder):
    return ColorClassifier(clip_backbone(str(folder)), batch_size=3)


def reference_crop(image, box, mask):
    """As GenEval's evaluation crops with Pillow."""
    (picture,) = pictures(image[None])
    if mask is not None:
        gray = Image.new("RGB", picture.size, "#999")
        picture = Image.composite(picture, gray, Image.fromarray(mask.numpy()))
    return picture.crop(box)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("box", [(0, 0, 48, 48), (5, 7, 30, 21), (10.4, 3.6, 20.5, 40.2)])
def test_crops_are_those_of_pillow(box, masked):
    (image,) = images(1)
    mask = torch.rand(48, 48, generator=torch.Generator().manual_seed(0)) > 0.4 if masked else None
    crop = crop_object(image, Detection("dog", 0.9, box, mask))
    expected = np.asarray(reference_crop(image, box, mask)).transpose(2, 0, 1)
    assert np.array_equal((crop * 255).round().numpy(), expected)


def test_crops_are_never_empty_and_slivers_are_shortened():
    (image,) = images(1)
    for box in ((5.2, 5.1, 5.3, 9.0), (47.9, 47.9, 48.0, 48.0), (0, 0, 0, 0)):
        assert min(crop_object(image, Detection("dog", 0.9, box)).shape) >= 1
    sliver = crop_object(image, Detection("dog", 0.9, (3.0, 0.0, 5.0, 48.0)))
    assert sliver.shape == (3, 32, 2)  # sixteen times as long as wide
    assert torch.equal(sliver, image[:, 8:40, 3:5])


def test_colors_agree_with_a_direct_computation(folder, classifier):
    batch = images(7, 64)
    boxes = [(0, 0, 64, 64), (3, 5, 40, 22), (30, 2, 37, 60), (10, 10, 26, 26)] * 2
    names = ["dog", "car", "dog", "traffic light", "cup", "dog", "car"]
    detections = [Detection(n, 0.9, b) for n, b in zip(names, boxes, strict=False)]
    crops = [crop_object(image, d) for image, d in zip(batch, detections, strict=True)]
    got = classifier(crops, names, ["red"] * 7)

    model = CLIPModel.from_pretrained(folder).eval()
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    words = clip_tokenizer()

    def unit(features):
        return features / features.norm(dim=-1, keepdim=True)

    with torch.no_grad():
        for image, detection, color in zip(batch, detections, got, strict=True):
            picture = reference_crop(image, detection.box, None)
            pixels = processor(picture, return_tensors="pt")["pixel_values"]
            feature = unit(model.get_image_features(pixel_values=pixels).pooler_output)[0]
            scores = []
            for candidate in GENEVAL_COLORS:
                texts = [t.format(color=candidate, name=detection.name) for t in TEMPLATES]
                embedded = [
                    model.get_text_features(input_ids=clip_words(words, text)).pooler_output
                    for text in texts
                ]
                scores.append(unit(unit(torch.cat(embedded)).mean(0)) @ feature)
            assert color == GENEVAL_COLORS[int(torch.stack(scores).argmax())]
    assert len(set(got)) > 1
    # the same one by one
    assert [classifier([c], [n], ["red"])[0] for c, n in zip(crops, names, strict=True)] == got
    assert classifier([], [], []) == []


PAINT = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "gray": (0.6, 0.6, 0.6)}


class Painter(ClipBackbone):
    """A CLIP whose image feature is the mean colour and whose texts are the colours they name."""

    def image_features(self, images):
        assert images.shape[-2:] == (SIDE, SIDE)
        return torch.nn.functional.normalize(images.mean((2, 3)), dim=-1)

    def text_features(self, texts):
        words = [set(text.replace("-", " ").split()) & PAINT.keys() for text in texts]
        rows = [PAINT[found.pop()] if found else (0, 0, 0) for found in words]
        return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=-1)


def test_gray_is_a_candidate_only_where_it_is_asked_for(folder):
    clip = clip_backbone(str(folder))
    painter = Painter(clip.model, clip.tokenizer, clip.transform, "cpu")
    classifier = ColorClassifier(painter)
    gray = torch.full((3, 20, 20), 0.6)
    green = torch.zeros(3, 30, 10)
    green[1] = 1
    assert classifier([gray, green], ["dog", "dog"], ["gray", "gray"]) == ["gray", "green"]
    named = classifier([gray, green], ["dog", "dog"], ["red", "red"])
    assert named[0] in GENEVAL_COLORS
    assert named[1] == "green"
