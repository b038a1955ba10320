"""Settings for all tests."""

from __future__ import annotations

import os

# workers of pytest-xdist share the cores; set before torch is imported, and seen by subprocesses
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
