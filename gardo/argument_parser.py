"""The parser of command lines that all entry points share."""

from __future__ import annotations

import argparse
from typing import NoReturn

from gardo.types import UserError


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser whose mistakes are one message instead of the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")
