"""Settings in a TOML file: the same names as in Python, a table for each configuration inside another one.

config = load_toml("run.toml", TrainConfig)
"""

from __future__ import annotations

import tomllib
from dataclasses import MISSING, fields, is_dataclass
from inspect import formatannotation
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Config = TypeVar("Config")


def load_toml(path: str | Path, config_class: type[Config], **defaults: Any) -> Config:
    """A configuration of `config_class` read from a TOML file; a table stands for a configuration inside it.

    TOML has no word for None: write "None", as on the command line. `defaults` stand for fields that the file leaves
    out.

    Raises:
        OSError: the file cannot be read.
        ValueError: naming the file and the key: it is no TOML, a key is unknown or missing, a value has the wrong type
            or makes no sense.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        return _from_table(config_class, table, defaults)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _from_table(
    config_class: type[Config], table: dict[str, Any], defaults: dict[str, Any], prefix: str = ""
) -> Config:
    hints = get_type_hints(config_class)
    for key in table:
        if key not in hints:
            raise ValueError(f"{prefix}{key} is unknown, expected one of {', '.join(hints)}")
    values = defaults | {key: _converted(value, hints[key], prefix + key) for key, value in table.items()}
    for part in fields(config_class):  # type: ignore[arg-type]  # a dataclass, which a TypeVar cannot say
        if part.name not in values and part.default is MISSING and part.default_factory is MISSING:
            raise ValueError(f"{prefix}{part.name} is missing, expected {formatannotation(hints[part.name])}")
    try:
        return config_class(**values)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error


def _converted(value: Any, hint: Any, name: str) -> Any:
    """What TOML can say, `value`, as the type `hint`: lists become tuples, integers floats, tables configurations."""
    alternatives = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value == "None" and NoneType in alternatives:
        return None
    for alternative in alternatives:
        if isinstance(value, dict) and isinstance(alternative, type) and is_dataclass(alternative):
            return _from_table(alternative, value, {}, prefix=f"{name}.")
        if get_origin(alternative) is Literal and value in get_args(alternative):
            return value
        if get_origin(alternative) is tuple and isinstance(value, list):
            return tuple(_converted(item, get_args(alternative)[0], f"{name}[{i}]") for i, item in enumerate(value))
        if alternative is float and type(value) is int:
            return float(value)
        if type(value) is alternative:  # not isinstance: true is no number
            return value
    raise ValueError(f"{name} is {value!r}, expected {formatannotation(hint)}")
