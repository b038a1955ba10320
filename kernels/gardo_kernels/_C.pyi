"""Types of the compiled core: csrc/bindings has the functions of each op, and their arguments."""

from typing import Any

has_openmp: bool
has_cuda: bool

def __getattr__(name: str) -> Any: ...
