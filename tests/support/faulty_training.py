"""Run by torchrun in `test_health`: trains with a hook of `tests.support.forked` in every process.

Usage: torchrun ... faulty_training.py HOOK ARGUMENT ...; HOOK is JSON with a name and arguments.
"""

from __future__ import annotations

import json
import sys

import gardo.train
from gardo import cli
from tests.support.forked import HOOKS

if __name__ == "__main__":
    hook = json.loads(sys.argv.pop(1))
    HOOKS[hook["name"]](**hook["with"])
    cli.run(gardo.train.main)
