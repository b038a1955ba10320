"""Configurations from a recipe, YAML files and overrides; every mistake is named with its key."""

from __future__ import annotations

import difflib
import os
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from gardo.config.consistency import contradictions
from gardo.config.removed import compat_of_earlier, refuse_removed, settle_removed
from gardo.config.schema import Config
from gardo.types import UserError

RECIPES = Path(__file__).parent.parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the built-in recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_description(name: str) -> str:
    """The first comment line of a built-in recipe."""
    first = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").split("\n", 1)[0]
    return first.removeprefix("#").strip()


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping. Raises UserError with the file and the place of the mistake."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UserError(f"config file '{path}' does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file '{path}' cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"config file '{path}' is not valid YAML: {error}") from None
    except (ValueError, RecursionError) as error:  # a NUL in the path; brackets without end
        raise UserError(f"config file '{path}' cannot be read: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"config file '{path}': expected a mapping of keys, got {_kind(data)}")
    compat_of_earlier(data)
    return _with_switches(data)


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-4 as a number and `off` as a word (YAML 1.1 has it otherwise)."""


_OWN_RULES = ("tag:yaml.org,2002:float", "tag:yaml.org,2002:bool")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _OWN_RULES]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool",
    re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"),
    list("tTfF"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def parse_value(text: str) -> Any:
    """Read a command-line value as YAML does: numbers, true/false, null, lists, else a string."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError):
        return text


def load_config(
    recipe: str = "tiny",
    files: Sequence[Path] = (),
    overrides: Sequence[tuple[str, str]] = (),
    to_evaluate: bool = False,
) -> Config:
    """Merge a recipe, further YAML files and dotted overrides, in this order, and validate.

    Args:
        recipe: name of a built-in recipe, or path of a YAML file.
        files: YAML files whose keys win over the recipe's.
        overrides: ``(dotted key, text)`` pairs that win over everything.
        to_evaluate: whether keys of training that are gone do not matter in the recipe.

    A recipe may name another one as its ``base`` and then holds only what differs.

    Raises:
        UserError: unknown recipe or key, wrong type or range, contradictory options.
    """
    data = read_recipe(recipe, to_evaluate)
    for file in files:
        _merge(data, read_yaml(file))
        settle_removed(data)
    for dotted, text in overrides:
        parts = dotted.split(".")
        value: Any = text if _takes_text(dotted) else parse_value(text)
        for part in reversed(parts):
            value = {part: value}
        _merge(data, _with_switches(value))
    for dotted, text in overrides:
        refuse_removed(dotted, parse_value(text), data)
    config = validate(data)
    name = config.recipe or Path(recipe).stem
    # it becomes part of paths
    if name in (".", "..") or not name.isprintable() or set(name) & set("/\\{}"):
        raise UserError(f"recipe: expected a plain name without a path in it, got {name!r}")
    folder = _folder("output_dir", config.output_dir.replace("{recipe}", name))
    return config.model_copy(update={"recipe": name, "output_dir": folder})


def _folder(key: str, text: str) -> str:
    """Check the text of a path before anything asks the system for it."""
    unknown = re.findall(r"\{[^{}]*\}", text)
    if unknown:
        raise UserError(f"{key}: expected no placeholder but {{recipe}}, got '{unknown[0]}'")
    if not text.strip() or not text.isprintable():
        raise UserError(f"{key}: expected the path of a folder, got {text!r}")
    try:
        Path(text).expanduser()
    except RuntimeError as error:  # of a user that is not there
        raise UserError(f"{key} '{text}': {str(error)[:1].lower()}{str(error)[1:]}") from None
    return text


def _takes_text(dotted: str) -> bool:
    """Whether the key is a plain string, so that ``--output_dir 2026`` stays one."""
    return any(name == dotted and field.annotation is str for name, field in iter_keys())


def _recipe_path(recipe: str) -> Path:
    if recipe in recipe_names():
        return RECIPES / f"{recipe}.yaml"
    if recipe.endswith((".yaml", ".yml")) or "/" in recipe:
        return Path(recipe)
    near = difflib.get_close_matches(recipe, recipe_names(), n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise UserError(
        f"unknown recipe '{recipe}'{hint} (built in: {', '.join(recipe_names())}; or a YAML path)"
    )


def read_recipe(
    recipe: str, to_evaluate: bool = False, derived: Sequence[Path] = ()
) -> dict[str, Any]:
    """Read a recipe on top of its ``base``, if it has one; lists replace, sections merge.

    Args:
        recipe: name of a built-in recipe, or path of a YAML file.
        to_evaluate: as for `load_config`.
        derived: files that led here by their ``base``, outermost first.

    Raises:
        UserError: unknown recipe, unreadable file, or recipes that are each other's base.
    """
    path = _recipe_path(recipe)
    if path in derived:
        chain = " -> ".join(f"'{p}'" for p in (*derived, path))
        raise UserError(f"base: recipes are each other's base: {chain}")
    data = read_yaml(path)
    base = data.pop("base", None)
    if base is None:
        settle_removed(data, to_evaluate)
        return data
    if not isinstance(base, str):
        raise UserError(f"base: expected a recipe's name or path in '{path}', got {base!r}")
    if base.endswith((".yaml", ".yml")):  # a path is relative to the file that names it
        base = str(Path(os.path.normpath(path.parent / Path(base).expanduser())))
    merged = read_recipe(base, to_evaluate, (*derived, path))
    _merge(merged, data)
    settle_removed(merged, to_evaluate)
    return merged


def validate(data: Mapping[str, Any]) -> Config:
    """Check a nested mapping against the schema; UserError names the key, need and value."""
    settled = _with_switches(deepcopy(dict(data)))
    settle_removed(settled)
    _check_keys(settled)
    try:
        config = Config.model_validate(settled)
    except ValidationError as error:
        raise UserError(_explain(error)) from None
    for problem in contradictions(config):
        raise UserError(problem)
    return config


def to_yaml(config: Config) -> str:
    """The complete configuration as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def iter_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted key with its pydantic field, sections expanded."""
    for name, field in model.model_fields.items():
        if _is_section(field.annotation):
            yield from iter_keys(field.annotation, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{name}", field


def type_name(annotation: Any) -> str:
    """How ``--help`` prints a type: ``int``, ``a|b|c``, ``list``."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return type_name(get_args(annotation)[0])
    if origin is Literal:
        return "|".join(str(a) for a in get_args(annotation))
    if origin in (Union, types.UnionType):
        return "|".join("null" if a is type(None) else type_name(a) for a in get_args(annotation))
    if origin is not None:
        return origin.__name__
    return str(getattr(annotation, "__name__", annotation))


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _with_switches(data: dict[str, Any], model: type[BaseModel] = Config) -> dict[str, Any]:
    """Give a value that stands for a whole section to the key that it sets, in place."""
    for name, value in data.items():
        field = model.model_fields.get(str(name))
        section: Any = field.annotation if field and _is_section(field.annotation) else None
        if section and isinstance(value, dict):
            _with_switches(value, section)
        elif section and section.switch and not isinstance(value, Mapping):
            data[name] = {section.switch: value}
    return data


def _merge(base: dict[str, Any], update: Mapping[str, Any]) -> None:
    for name, value in update.items():
        if isinstance(value, Mapping) and isinstance(base.get(name), dict):
            _merge(base[name], value)
        else:
            base[name] = dict(value) if isinstance(value, Mapping) else value


def _check_keys(data: Mapping[str, Any], model: type[BaseModel] = Config, prefix: str = "") -> None:
    """Refuse unknown keys with the nearest valid one, before types are looked at."""
    for name, value in data.items():
        dotted = f"{prefix}{name}"
        field = model.model_fields.get(str(name))
        if field is None:
            known = [k for k, _ in iter_keys()]
            near = _nearest(dotted, known)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise UserError(f"unknown key '{dotted}'{hint} (see --help for all keys)")
        if _is_section(field.annotation):
            if not isinstance(value, Mapping):
                raise UserError(f"{dotted}: expected a section with keys, got {value!r}")
            _check_keys(value, field.annotation, f"{dotted}.")  # type: ignore[arg-type]


def _nearest(dotted: str, known: Sequence[str]) -> list[str]:
    """The key that was meant, or none; the area counts less than the name in it."""
    name = dotted.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(dotted, known, n=1, cutoff=0.6)
    if near and difflib.SequenceMatcher(None, name, near[0].rsplit(".", 1)[-1]).ratio() >= 0.5:
        return near
    for key in known:  # the right name in the wrong area, or its initials, such as lr
        last = key.rsplit(".", 1)[-1]
        if name == last or (name == "".join(w[0] for w in last.split("_")) and len(name) > 1):
            return [key]
    return []


def _explain(error: ValidationError) -> str:
    """One sentence for the first problem: the key, what was expected and what came."""
    first = error.errors(include_url=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    where = []
    for part in first["loc"]:  # the path ends where a union or list of pydantic's own begins
        if isinstance(part, str) and part.isidentifier():
            where.append(part)
        else:
            break
    message = message.replace("Input should be", "expected", 1)
    return f"{'.'.join(where)}: {message}, got {_without_secrets(repr(first.get('input')))}"


def _without_secrets(text: str) -> str:
    """A text in which the user and password of URLs are not shown."""
    return re.sub(r"//[^/\s'\"]*@", "//***@", text)


def _kind(value: Any) -> str:
    return type(value).__name__
