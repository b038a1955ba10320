"""The card beside exported weights."""

from __future__ import annotations

import pytest
import yaml

from gardo.config import load_config
from gardo.run.card import model_card

ROWS = [
    {"epoch": 0, "reward/count/mean": 1.0, "reward/clean/mean": 0.5, "time/evaluate": 3.0},
    {"epoch": 7, "reward/count/mean": 1.25, "reward/clean/mean": 0.25, "reward/judge/mean": 0.125},
]


def card(**overrides):
    config = load_config("tiny", overrides=list(overrides.items()))
    return model_card(config, "sd3", ROWS)


def test_front_matter_evaluation_and_configuration():
    text = card(**{"model.path": "someone/sd35: medium"})
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", "reinforcement-learning", "gardo", "lora"],
        "base_model": "someone/sd35: medium",
    }
    assert "| count (trained on) | 1 | 1.25 |" in body
    assert "| clean (auxiliary) | 0.5 | 0.25 |" in body
    assert "| judge | - | 0.125 |" in body
    assert "time/evaluate" not in body
    assert 'pipe.load_lora_weights("path/to/export")' in body
    embedded = body.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(embedded)["model"]["path"] == "someone/sd35: medium"


def test_a_single_evaluation_is_no_comparison():
    text = model_card(load_config("tiny"), "sd3", ROWS[1:])
    assert "| | after 7 epochs |\n|---|---|\n| count (trained on) | 1.25 |" in text
    assert "before" not in text


def test_the_embedded_model_is_no_base_on_the_hub():
    assert "base_model" not in card()


@pytest.mark.parametrize("full", [False, True])
def test_the_code_in_the_card_parses(full):
    text = card(**{"model.full_finetune": str(full).lower()})
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert ("transformer=transformer" in code) is full
    assert ("load_lora_weights" in code) is not full
    assert "- lora" not in text or not full
