"""One folder per op: argument checks in ``__init__``, the oracle in ``reference``."""
