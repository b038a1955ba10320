"""What the sections of a configuration are made of: number types, lists of names, sections."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Percentile = Annotated[float, Field(ge=0.0, le=100.0)]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


def as_names(value: Any) -> Any:
    """Accept "a,b" for a list of names, as typed on a command line."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def as_pair(value: Any) -> Any:
    """Accept a list for a pair."""
    return tuple(value) if isinstance(value, list) else value  # YAML has no tuples


def _clip_range(value: Any) -> Any:
    parts = value if isinstance(value, (list, tuple)) else [value]
    numbers = [
        p for p in parts if isinstance(p, (int, float)) and not isinstance(p, bool) and p > 0
    ]
    if len(numbers) != len(parts) or (parts is value and len(parts) != 2):
        raise ValueError("expected a positive number or a pair [low, high] of them")
    return tuple(float(n) for n in numbers) if parts is value else float(numbers[0])


def _kl_coef(value: Any) -> Any:
    share = value.get("target_share") if isinstance(value, Mapping) else value
    number = share if isinstance(share, (int, float)) and not isinstance(share, bool) else math.nan
    if not math.isfinite(number) or number < 0:
        raise ValueError("expected a number from 0 on, or {target_share: NUMBER above 0}")
    if not isinstance(value, Mapping):
        return float(number)
    if set(value) != {"target_share"} or number == 0:
        raise ValueError("expected {target_share: NUMBER above 0} and nothing else")
    return {"target_share": float(number)}


def _diversity(value: Any) -> Any:
    if value == "all":
        return True
    if not isinstance(value, bool) and value != "supported":
        raise ValueError("expected true, false, all (which is true) or supported")
    return value


def _switch(value: Any) -> Any:
    """Accept what another YAML reader makes of on and off."""
    return ("on" if value else "off") if isinstance(value, bool) else value


def _proxy(value: Any) -> Any:
    """One name as it is; several as name -> weight, with weight 1 where none is given."""
    if isinstance(value, str):
        names = as_names(value)
        return names[0] if len(names) == 1 else _proxy(names)
    if isinstance(value, list):
        if not all(isinstance(name, str) for name in value) or len(set(value)) != len(value):
            raise ValueError("expected different reward names")
        value = dict.fromkeys(value, 1.0)
    if isinstance(value, Mapping):
        for weight in value.values():
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if not number or not math.isfinite(weight) or weight == 0:
                raise ValueError("expected a weight other than 0, a number, for each reward")
        value = {name: float(weight) for name, weight in value.items()}
    if not value or not isinstance(value, dict):
        raise ValueError("expected a reward's name, or names with weights")
    return value


def _servers(value: Any) -> Any:
    urls = as_names(value)
    if urls == []:
        raise ValueError("expected at least one URL")
    for url in urls if isinstance(urls, list) else ():
        parts = urlsplit(url) if isinstance(url, str) else None
        # asking for the port raises ValueError where it is no number
        if parts and (
            parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0
        ):
            raise ValueError("expected http://HOST:PORT or https://HOST:PORT")
        if parts and (parts.username or parts.query or parts.fragment):
            raise ValueError("expected URLs without user, query and fragment (for a secret: token)")
    return urls


Names = Annotated[list[str], BeforeValidator(as_names)]
Servers = Annotated[list[str], BeforeValidator(_servers), Field(min_length=1)]
Proxy = Annotated[str | dict[str, float], BeforeValidator(_proxy)]
Trackers = Annotated[list[Literal["tensorboard", "wandb"]], BeforeValidator(as_names)]
KLCoef = Annotated[float | dict[str, float], BeforeValidator(_kl_coef)]
Diversity = Annotated[bool | Literal["supported"], BeforeValidator(_diversity)]
Switch = Annotated[Literal["off", "on"], BeforeValidator(_switch)]
ClipRange = Annotated[float | tuple[float, float], BeforeValidator(_clip_range)]


class Section(BaseModel):
    """An area of the configuration."""

    #: the key that a value in place of the section's keys is given to
    switch: ClassVar[str | None] = None

    # strict: "12" is no number and 1 is no bool; YAML has already told the types apart
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


Resume = Literal["nothing", "rounding", "results"]


def key(default: Any, description: str, resume: Resume = "results") -> Any:
    """A documented key; the description is what ``--help`` prints.

    ``resume`` says what a change of the key on resume changes: ``nothing``, since no number of a
    run depends on it; ``rounding``, since it only decides how the same numbers are computed; or
    ``results``.
    """
    return Field(default=default, description=description, json_schema_extra={"resume": resume})


free_key = partial(key, resume="nothing")
rounding_key = partial(key, resume="rounding")


def on_resume(field: FieldInfo) -> Resume:
    """What a change of a key on resume changes, as its definition says."""
    return field.json_schema_extra["resume"]  # type: ignore[index, return-value]


def section(model: type[Section], description: str) -> Any:
    """A documented section with the defaults of ``model``."""
    return Field(default_factory=model, description=description)
