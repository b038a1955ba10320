"""Prompts from data sets of the hub: without the package, with a stand-in, with the package."""

from __future__ import annotations

import importlib.util
import json
import sys
import types

import pytest

from gardo.config import PromptsConfig
from gardo.data.prompts import load_prompts
from gardo.types import UserError


class Rows:
    """As much of ``datasets.Dataset`` as is used."""

    def __init__(self, columns):
        self.columns = columns
        self.column_names = list(columns)

    def __getitem__(self, column):
        return self.columns[column]


@pytest.fixture
def stand_in(monkeypatch):
    """A package ``datasets`` that knows one data set."""
    calls = []

    def load_dataset(name, split):
        calls.append((name, split))
        if name != "some/prompts":
            raise FileNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
        if split != "train":
            raise ValueError(f'Unknown split "{split}".')
        return Rows({"text": [" a dog ", "a cat"], "id": [1, 2], "empty": [], "gap": ["a", ""]})

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def config(name="some/prompts", column="text", **more):
    return PromptsConfig(dataset=name, column=column, per_epoch=1, **more)


def test_a_column_is_read(stand_in):
    prompts = load_prompts(config(generator="shapes"))
    assert [p.text for p in prompts] == ["a dog", "a cat"]
    assert prompts[1].origin == "data set 'some/prompts', split 'train', row 2"
    assert stand_in == [("some/prompts", "train")]


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"name": "other/prompts"}, "'other/prompts', split 'train' cannot be loaded: Dataset"),
        ({"split": "validation"}, "split 'validation' cannot be loaded: Unknown split"),
        ({"column": "caption"}, "expected one of text, id, empty, gap; got 'caption'"),
        ({"column": "id"}, "row 1: expected a prompt, got 1"),
        ({"column": "gap"}, "row 2: expected a prompt, got ''"),
        ({"column": "empty"}, "at least one prompt"),
    ],
)
def test_mistakes_are_named(stand_in, wrong, expected):
    with pytest.raises(UserError) as caught:
        load_prompts(config(**wrong))
    assert expected in str(caught.value)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="'gardo\\[datasets\\]'"):
        load_prompts(config())


@pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="the package datasets is not installed"
)
def test_a_folder_of_json_files_through_the_package(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    lines = [json.dumps({"caption": f"prompt {i}"}) for i in range(3)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    prompts = load_prompts(config(name=str(folder), column="caption"))
    assert [p.text for p in prompts] == ["prompt 0", "prompt 1", "prompt 2"]
