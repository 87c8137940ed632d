"""The broker's configuration and events as JSON.

Without strict reading, an event (written by the process that handles hostile bytes) could carry a gigabyte, a number
where a text belongs, or half a character into the journal of the session.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from enum import StrEnum
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from vmsandbox.egress.values import BrokerConfig, EgressEvent, EgressPolicy
from vmsandbox.errors import VmsandboxError

MAX_EVENT = 64 << 10  # bytes of a line
MAX_CONFIG = 8 << 20
MAX_TEXT = 2048
MAX_PATH = 8192
MAX_MORE = 32
_LARGEST = 1 << 62
_T = TypeVar("_T")


class WireError(VmsandboxError):
    """What was read is no configuration or event."""


def config_to_json(config: BrokerConfig) -> bytes:
    """One line of ASCII. Holds secrets: goes through a pipe and is never logged."""
    return _line(dataclasses.asdict(config))


def config_from_json(content: str | bytes) -> BrokerConfig:
    """The configuration of `config_to_json`.

    Raises:
        WireError: it is none; says where, and never quotes a value.
    """
    return _read(content, BrokerConfig, MAX_CONFIG)


def policy_to_json(policy: EgressPolicy) -> dict[str, Any]:
    """Plain values (no secrets are in a policy), for `--json` and records."""
    found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(policy)))
    return found


def event_to_json(event: EgressEvent) -> bytes:
    """One line with its newline; texts are cut so that `parse_untrusted_event` takes it."""
    plain = dataclasses.asdict(event)
    for name, value in plain.items():
        if isinstance(value, float) and not math.isfinite(value):
            plain[name] = 0.0
    plain["more"] = dict(list(event.more.items())[:MAX_MORE])
    line = _line(_shortened(plain, MAX_TEXT, MAX_PATH))
    for length in (256, 64, 16):
        if len(line) > MAX_EVENT:  # escaped, a character may have twelve bytes
            line = _line(_shortened(plain, length, length))
    return line


def parse_untrusted_event(line: bytes) -> EgressEvent:
    """One line of the broker, read strictly: known keys, right types, limits on every length.

    Raises:
        WireError: it is no event.
    """
    event = _read(line, EgressEvent, MAX_EVENT)
    texts = [(name, getattr(event, name)) for name in ("via", "host", "method", "rule", "reason", "remedy", "address")]
    texts += [("more", text) for pair in event.more.items() for text in pair]
    for name, text in texts:
        if len(text) > MAX_TEXT:
            raise WireError(f"an event's {name} is too long")
    if len(event.path) > MAX_PATH or len(event.more) > MAX_MORE:
        raise WireError("an event's path or more is too long")
    for name in ("port", "status", "sent", "received", "time", "seconds"):
        if not 0 <= getattr(event, name) <= (65535 if name == "port" else _LARGEST):
            raise WireError(f"an event's {name} is out of range")
    return event


def _shortened(plain: dict[str, Any], text: int, path: int) -> dict[str, Any]:
    found = {
        name: _cut(value, path if name == "path" else text) if isinstance(value, str) else value
        for name, value in plain.items()
    }
    found["more"] = {_cut(key, min(text, 64)): _cut(value, text) for key, value in plain["more"].items()}
    return found


def _line(plain: dict[str, Any]) -> bytes:
    return json.dumps(plain, separators=(",", ":")).encode("ascii") + b"\n"


def _cut(text: str, length: int) -> str:
    whole = text.encode("utf-8", "replace").decode("utf-8")  # no half characters
    return whole if len(whole) <= length else whole[: length - 1] + "…"


def _read(content: str | bytes, kind: type[_T], limit: int) -> _T:
    if len(content) > limit:
        raise WireError(f"too long to be a {kind.__name__}: {len(content)}")
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        data = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise WireError(f"not the JSON of a {kind.__name__}", details=type(error).__name__) from None
    found: _T = _value(data, kind, kind.__name__)
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key that is there twice")
    return found


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _value(data: Any, kind: Any, where: str) -> Any:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return (
            None if data is None else _value(data, next(one for one in get_args(kind) if one is not type(None)), where)
        )
    if origin is tuple:
        if not isinstance(data, list):
            raise WireError(f"{where} is not a list")
        return tuple(_value(one, get_args(kind)[0], f"{where}[{number}]") for number, one in enumerate(data))
    if origin is dict:
        if not isinstance(data, dict):
            raise WireError(f"{where} is not an object")
        return {_text(key, where): _value(one, get_args(kind)[1], where) for key, one in data.items()}
    if dataclasses.is_dataclass(kind):
        return _object(data, kind, where)
    if issubclass(kind, StrEnum):
        if not isinstance(data, str) or data not in list(kind):
            raise WireError(f"{where} is no {kind.__name__}")
        return kind(data)
    if kind is str:
        return _text(data, where)
    if kind is bool and isinstance(data, bool):
        return data
    if kind is int and isinstance(data, int) and not isinstance(data, bool):
        return data
    if kind is float and isinstance(data, int | float) and not isinstance(data, bool) and abs(data) <= _LARGEST:
        return float(data)
    raise WireError(f"{where} is no {getattr(kind, '__name__', kind)}")


def _object(data: Any, kind: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise WireError(f"{where} is not an object")
    hints = _hints(kind)
    if unknown := [key for key in data if key not in hints]:
        raise WireError(f"{where} has an unknown key {unknown[0][:40]!a}")
    needed = [one.name for one in dataclasses.fields(kind) if _needed(one)]
    if missing := [name for name in needed if name not in data]:
        raise WireError(f"{where} has no {missing[0]}")
    return kind(**{name: _value(one, hints[name], f"{where}.{name}") for name, one in data.items()})


def _needed(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _text(data: Any, where: str) -> str:
    if not isinstance(data, str):
        raise WireError(f"{where} is not a text")
    try:
        data.encode("utf-8")
    except UnicodeEncodeError:
        raise WireError(f"{where} has half a character") from None
    return data
