"""Records: found again as they were, or not at all."""

from __future__ import annotations

import json

import pytest
import torch

from gardo.evaluation.cache import (
    EvaluationCache,
    content_name,
    decode_png,
    decode_vector,
    encode_png,
    encode_vector,
)
from gardo.types import UserError

KEY = {"prompt": "two red circles", "seed": 1, "weights": {"lora": "abc"}}


@pytest.fixture
def told():
    return []


@pytest.fixture
def cache(tmp_path, told):
    return EvaluationCache(tmp_path / "cache", told.append)


@pytest.fixture
def record(cache):
    image = torch.rand(3, 8, 10, generator=torch.Generator().manual_seed(0))
    record = cache.new(KEY, image)
    record.values["score x"] = 0.1
    cache.save(record)
    return record


def test_found_again(cache, record, told):
    found = cache.find(dict(reversed(KEY.items())))
    assert found == record
    assert cache.image(found).shape == (3, 8, 10)
    assert cache.find({**KEY, "seed": 2}) is None
    assert told == []


@pytest.mark.parametrize("suffix", [".png", ".json"])
@pytest.mark.parametrize("damage", ["empty", "half", "flipped", "gone"])
def test_damage_is_named_and_not_used(cache, record, told, suffix, damage):
    path = cache.path(record.name, suffix)
    data = path.read_bytes()
    middle = data.index(b"0.1") + 2 if suffix == ".json" else len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "half": data[: len(data) // 2], "flipped": flipped}[damage])
    assert cache.find(KEY) is None
    if (suffix, damage) == (".json", "gone"):  # as if it had never been there
        assert told == []
    else:
        assert str(path) in told[0]
        assert "made again" in told[0]
    cache.new(KEY, torch.zeros(3, 8, 10))
    assert cache.find(KEY) is not None


def test_a_record_under_another_name_is_not_used(cache, record, told):
    other = {**KEY, "seed": 2}
    path = cache.path(content_name(other), ".json")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(cache.path(record.name, ".json").read_bytes())
    assert cache.find(other) is None
    assert "damaged" in told[0]


@pytest.mark.parametrize("body", ["[]", "{}", "null", "[[[[", '{"checksum": 1}'])
def test_json_of_another_kind(cache, record, body):
    cache.path(record.name, ".json").write_text(body)
    assert cache.find(KEY) is None


def test_names_and_files_say_what_is_in_them(cache, record):
    assert len(record.name) == 64
    body = json.loads(cache.path(record.name, ".json").read_text())
    assert body["key"] == KEY
    assert body["values"] == {"score x": 0.1}


def test_png_keeps_every_pixel_value():
    levels = torch.arange(256).float().div(255).expand(3, 2, 256)
    assert torch.equal(decode_png(encode_png(levels)), levels)


def test_vectors_are_kept_bit_by_bit():
    vector = torch.tensor([0.1, -1e-30, 3.4e38, float("nan")])
    found = decode_vector(encode_vector(vector))
    assert torch.equal(found[:3], vector[:3])
    assert found[3].isnan()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    cache = EvaluationCache(tmp_path / "file", print)
    with pytest.raises(UserError, match="cannot be (written|read)"):
        cache.new(KEY, torch.zeros(3, 2, 2))
