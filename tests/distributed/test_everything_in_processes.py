"""With every key of the method on, neither processes nor batch sizes change what is measured."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpointing.test_resume import rows
from tests.distributed.test_fsdp import launch
from tests.support.everything import ALGORITHMS
from tests.support.train_in_processes import run

SETTINGS = {
    "seed": 1,  # with which samples are gated in every epoch
    "epochs": 3,
    "prompts.group_size": 9,
    "model.lora.rank": 4,
    "sampling.batch_size": 9,
    "train.ema": "false",
    "train.batch_size": 4,
    "evaluation.every": 0,
    "evaluation.max_prompts": 1,
    "evaluation.grid_images": 0,
    "checkpoint.every": 0,
    "algorithm.reference.reset_steps": 5,
}


def cases(folder, **changes):
    return [
        {"folder": str(folder / name), "settings": {**keys, **SETTINGS, **changes}}
        for name, keys in ALGORITHMS.items()
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    for case in cases(folder):
        run(case)
    return folder


def assert_same_run(folder, alone):
    for name in ALGORITHMS:
        ours, theirs = (rows(f / name / "metrics.jsonl") for f in (folder, alone))
        for row, expected in zip(ours, theirs, strict=True):
            assert row.keys() == expected.keys()
            for figure, value in expected.items():
                if figure.startswith("forwards/") or not isinstance(value, float):
                    continue
                if figure in ("kl/gradient_share", "kl/coef"):
                    close = pytest.approx(value, rel=1e-4)
                else:
                    close = pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True)
                assert row[figure] == close, (name, row["epoch"], figure)
        seen, expected = (load_file(f / name / "seen.safetensors") for f in (folder, alone))
        for epoch in range(SETTINGS["epochs"]):
            assert torch.equal(seen[f"{epoch}/gate"], expected[f"{epoch}/gate"])


def test_the_run_measures_and_holds_the_share(alone):
    for name in ALGORITHMS:
        first, *others = rows(alone / name / "metrics.jsonl")
        # the policy is the reference
        assert (first["kl/gradient_share"], first["kl/coef"]) == (0.0, 0.0)
        measured = [row["kl/gradient_share"] or 0 for row in others]
        assert max(measured) > 0.1
        assert math.isfinite(others[-1]["kl/coef"])
        assert others[-1]["kl/coef"] > 0
        assert all(row["cap/share"] > 0 for row in (first, *others))


@pytest.mark.parametrize(("processes", "batch_size"), [(2, 2), (3, 7)])
def test_processes_and_batch_sizes_agree(alone, tmp_path, processes, batch_size):
    changed = cases(tmp_path, **{"train.batch_size": batch_size})
    launch(tmp_path, changed, processes=processes, fsdp=False)
    assert_same_run(tmp_path, alone)
