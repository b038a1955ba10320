"""The example of the documentation runs as it is printed."""

from __future__ import annotations

import re
from pathlib import Path

import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"


def test_example_runs():
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(examples) == 1
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(examples[0], str(PAGE), "exec"), names)
    assert names["policy"].weight.grad.abs().sum() > 0
    assert len(names["latents"]) == 11
