"""The experiments stand in the folder `experiments` of a checkout; this is their old name.

``python -m gardo.experiments.mixture`` still runs ``experiments.mixture``; it goes with 0.3.
"""

from __future__ import annotations

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
if not (_ROOT / "experiments" / "command.py").is_file():
    raise ImportError("the experiments run from a checkout: python -m experiments.mixture")
sys.path.insert(0, str(_ROOT))
__path__ = [str(_ROOT / "experiments")]
print("gardo.experiments is called experiments now", file=sys.stderr)
