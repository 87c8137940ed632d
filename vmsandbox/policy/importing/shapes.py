"""The shapes that values of compose and devcontainer files have, or an error that says which one is missing.

Without them a list where a text belongs would become the text of a list.
"""

from __future__ import annotations

from typing import Any

from vmsandbox.policy.importing.texts import number, shown, size

_FALSE, _TRUE = ("false", "0", "no"), ("", "true", "1", "yes")


class NotUnderstoodError(ValueError):
    """A value has a shape that its own program would not take either."""


def a_flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _TRUE + _FALSE:
        return value.lower() in _TRUE
    raise NotUnderstoodError(f"neither true nor false: {shown(value)}")


def a_text(value: Any) -> str:
    if not isinstance(value, str):
        raise NotUnderstoodError(f"not a text: {shown(value)}")
    return value


def a_list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise NotUnderstoodError(f"not a list: {shown(value)}")
    return value


def a_mapping(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise NotUnderstoodError(f"not a mapping: {shown(value)}")
    return value


def a_size(value: Any) -> int:
    found = size(value)
    if found is None:
        raise NotUnderstoodError(f"not a size: {shown(value)}")
    return found


def a_number(value: Any) -> float:
    found = number(value)
    if found is None:
        raise NotUnderstoodError(f"not a positive number: {shown(value)}")
    return found
