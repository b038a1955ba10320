"""Small runs, exports and pipelines of the embedded model, and evaluations of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from gardo.config import load_config, to_yaml
from gardo.evaluate import main
from gardo.models.adapters import build_adapters
from gardo.models.loading import load_model
from gardo.tiny import pipeline_path

PROMPTS = ("two red circles", "one blue square", "three green circles")
SETTINGS = {
    "device": "cpu",
    "threads": "1",
    "model.lora.rank": "2",
    "sampling.num_steps": "3",
    "sampling.sde_window": "0",
    "sampling.batch_size": "4",
    "evaluation.num_steps": "2",
    "evaluation.samples_per_prompt": "2",
    "evaluation.max_prompts": "3",
}


@pytest.fixture(autouse=True, scope="session")
def offline():
    """No test of this folder asks the hub."""
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        yield


def make_run(folder: Path, moved: float = 0.05, **changes: str) -> Path:
    """A run folder as training leaves it, its weights moved by noise of this size."""
    overrides = {**SETTINGS, "output_dir": str(folder), **changes}
    config = load_config("tiny", overrides=list(overrides.items()))
    model = load_model(config.model, torch.device("cpu"), "fp32")
    adapters = build_adapters(model, config.model, seed=0, names=("policy",))
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapters.parameters().values():
            parameter.add_(moved * torch.randn(parameter.shape, generator=source))
    folder.mkdir(parents=True)
    adapters.export(model, str(folder / "export"))
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder


@dataclass(frozen=True)
class Places:
    """What can be compared; nothing in it is to be changed."""

    run: Path
    full: Path
    lora: Path
    pipeline: Path
    moved_pipeline: Path
    prompts: Path


@pytest.fixture(scope="session")
def places(tmp_path_factory) -> Places:
    root = tmp_path_factory.mktemp("places")
    lora = root / "adapter"
    run = make_run(root / "runs" / "first")
    shutil.copytree(run / "export", lora)
    full = make_run(root / "runs" / "full", moved=0.01, **{"model.full_finetune": "true"})
    moved = root / "moved pipeline"
    shutil.copytree(pipeline_path(), moved)
    shutil.rmtree(moved / "transformer")
    shutil.copytree(full / "export" / "transformer", moved / "transformer")
    prompts = root / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    return Places(run, full, lora, Path(pipeline_path()), moved, prompts)


def evaluate(out: Path, *words: Any) -> dict[str, Any]:
    """Run the command in this process and read what it wrote."""
    assert main([*map(str, words), "--out", str(out)]) == 0
    return json.loads((out / "evaluation.json").read_text())


def files(out: Path, name: str, data: dict[str, Any]) -> dict[tuple[str, int], bytes]:
    """The bytes of a contender's images by prompt and seed."""
    return {
        (row["prompt"], row["seed"]): (out / row["contenders"][name]["file"]).read_bytes()
        for row in data["images"]
    }
