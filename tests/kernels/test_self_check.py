"""``python -m gardo_kernels``: a table that is right, and that notices what is wrong."""

from __future__ import annotations

import math
import subprocess
import sys

import torch

from gardo_kernels import __main__ as self_check


def test_table_of_every_op():
    result = subprocess.run(
        [sys.executable, "-m", "gardo_kernels", "--device", "cpu"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for op in ("sde_step", "sde_log_prob", "grpo_loss", "nft_loss", "win_rate", "gate_samples",
               "cap_rewards"):  # fmt: skip
        lines = [line for line in result.stdout.splitlines() if line.startswith(f"{op} ")]
        assert any("reference" in line and line.endswith("ok") for line in lines), op
    assert "every available backend is right" in result.stdout


def test_a_wrong_backend_fails_the_check(monkeypatch, capsys):
    def broken(backend, dtype):
        return (torch.full((3,), 1.0 if backend == "reference" else 1.001),)

    always = {"reference": lambda *_: None, "native": lambda *_: None, "triton": lambda *_: "why"}
    monkeypatch.setattr(
        self_check, "checks", lambda device: [self_check.Check("op", always, broken)]
    )
    assert self_check.main(["--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG" in printed
    assert "why" in printed


def test_relative_error():
    one = torch.tensor([1.0, -4.0])
    assert self_check.relative_error((one, one), (one, one + 1)) == 1 / 3
    assert self_check.relative_error((one * math.nan,), (one,)) == math.inf
