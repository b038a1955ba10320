"""Without the C++ core everything runs in plain PyTorch, and asking for the core says why not."""

from __future__ import annotations

import subprocess
import sys
import textwrap


def run_without_core(code: str) -> str:
    # None in sys.modules is Python's own way to make an import fail.
    blocked = "import sys; sys.modules['gardo_kernels._C'] = None\n" + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", blocked], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_ops_fall_back_to_the_reference_and_native_is_refused() -> None:
    printed = run_without_core("""
        import torch
        import gardo_kernels as gk
        from gardo_kernels import core

        assert not core.is_available()
        assert not core.has_openmp()
        assert not core.has_cuda()
        proxy, ids = torch.tensor([0.0, 2.0]), torch.zeros(2, dtype=torch.int64)
        shaped = gk.shape_rewards(proxy, torch.zeros(1, 2), ids)
        assert shaped.advantage.tolist() == [-1.0, 1.0]
        try:
            gk.shape_rewards(proxy, torch.zeros(1, 2), ids, backend="native")
        except gk.BackendUnavailable as error:
            print(error)
    """)
    assert "'native' is not available" in printed
    assert "GARDO_NO_NATIVE=1" in printed


def test_the_core_itself_names_the_reason() -> None:
    printed = run_without_core("""
        import torch
        from gardo_kernels.ops.win_rate import native

        try:
            native.win_rate(torch.zeros(1, 2).double(), None)
        except RuntimeError as error:
            print(error)
    """)
    assert "the C++ core is not built" in printed
