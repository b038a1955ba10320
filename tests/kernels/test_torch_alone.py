"""The package needs torch alone: no numpy, no Triton, no faiss."""

from __future__ import annotations

import subprocess
import sys
import textwrap


def run_with_torch_alone(code: str) -> str:
    # None in sys.modules is Python's own way to make an import fail.
    blocked = (
        "import sys, warnings\nwarnings.simplefilter('ignore')\n"
        "sys.modules.update(dict.fromkeys(('numpy', 'triton', 'faiss')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", blocked + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_self_check_runs():
    printed = run_with_torch_alone("""
        import runpy
        sys.argv = ["gardo_kernels", "--device", "cpu"]
        try:
            runpy.run_module("gardo_kernels", run_name="__main__")
        except SystemExit as end:
            assert end.code == 0, end.code
    """)
    assert "triton is not installed" in printed
    assert "faiss is not installed" in printed
    assert "every available backend is right" in printed


def test_the_drop_ins_run_and_return_tensors():
    run_with_torch_alone("""
        import torch
        from gardo_kernels.compat.dance_grpo import flux_step
        from gardo_kernels.compat.flow_grpo import PerPromptStatTracker, sde_step_with_logprob

        class Scheduler:
            sigmas = torch.tensor([1.0, 0.75, 0.5, 0.0])

            def index_for_timestep(self, timestep):
                return 1

        x = torch.zeros(2, 3)
        assert len(sde_step_with_logprob(Scheduler(), x, 750.0, x)) == 4
        assert len(flux_step(x, x, 0.3, Scheduler.sigmas, 1, None, True, True)) == 3
        tracker = PerPromptStatTracker()
        prompts, rewards = ["b", "a", "b", "a"], [1.0, 2.0, 3.0, 2.0]
        got = tracker.update(prompts, rewards)
        assert isinstance(got, torch.Tensor)
        torch.testing.assert_close(got, torch.tensor([-1, 0, 1, 0]).double() / 1.0001)
        for kind in ("rwr", "sft", "dpo"):
            assert len(tracker.update(prompts, rewards, type=kind)) == 4
        shaped = tracker.update(prompts, torch.tensor(rewards), torch.rand(4, 5), "gardo")
        assert shaped.isfinite().all()
        assert tracker.get_stats() == (2.0, 2)
    """)
