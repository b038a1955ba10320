"""The secret that a reward server and its clients share. It is never logged or shown."""

from __future__ import annotations

import os
from pathlib import Path

from gardo.types import UserError

TOKEN_VARIABLE = "GARDO_REWARD_TOKEN"
"""The environment variable that is looked at unless another one is named."""


def read_token(variable: str, file: str | Path | None) -> str | None:
    """The bearer token from a file, or else from an environment variable; None for none.

    Raises:
        UserError: a file that cannot be read, or a token that no HTTP header can hold.
    """
    if file is not None:
        try:
            token = Path(file).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            kind = error.strerror if isinstance(error, OSError) else "not ASCII"
            raise UserError(f"token file '{file}' cannot be read: {kind}") from None
        source = f"token file '{file}'"
    else:
        token, source = os.environ.get(variable, "").strip(), f"${variable}"
        if not token:
            return None
    # never shown: only what is wrong with it
    if not token or not all("!" <= c <= "~" for c in token):
        raise UserError(f"{source}: expected one word of printable ASCII characters as the token")
    return token
