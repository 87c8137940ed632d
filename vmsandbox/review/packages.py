"""Packages as values, and careful readers of what names them.

Without these limits and checks, a manifest that a guest wrote (ten thousand brackets, a list where a table belongs)
would end the review that is to judge it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

MAX_BYTES = 4 << 20
MAX_TOML = 256 << 10  # tomllib is Python, and needs seconds for a megabyte
_MAX_ON_A_LINE = 500  # opening brackets
_MAX_KEY_PARTS = 50  # of a key: tomllib takes the square of them

# name → versions
Packages = dict[str, frozenset["Version"]]


class Version(NamedTuple):
    """One version of a package. version: for people. origin: where it comes from and its checksums, compared only."""

    version: str
    origin: str = ""


class NotUnderstood(Exception):
    """Not an error: the text is not of the format that the file's name says."""


def read_json(data: bytes) -> dict[str, Any]:
    """A JSON object. Raises NotUnderstood."""
    try:
        found = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise NotUnderstood from None
    if not isinstance(found, dict):
        raise NotUnderstood
    return found


def read_toml(data: bytes) -> dict[str, Any]:
    """A TOML document. Raises NotUnderstood."""
    import tomllib

    if len(data) > MAX_TOML or any(_is_too_much(line) for line in data.split(b"\n")):
        raise NotUnderstood
    try:
        return tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError, TypeError):
        raise NotUnderstood from None


def _is_too_much(line: bytes) -> bool:
    return line.partition(b"=")[0].count(b".") > _MAX_KEY_PARTS or line.count(b"[") > _MAX_ON_A_LINE


class Collected:
    """Packages being collected."""

    def __init__(self) -> None:
        self._found: dict[str, set[Version]] = defaultdict(set)

    def add(self, name: object, version: object, origin: object = "") -> None:
        if not isinstance(name, str) or not name:
            raise NotUnderstood
        text = version if isinstance(version, str) else _compact(version)
        self._found[name].add(Version(text, origin if isinstance(origin, str) else _compact(origin)))

    def done(self) -> Packages:
        return {name: frozenset(versions) for name, versions in self._found.items()}


def _compact(value: object) -> str:
    if value is None:
        return ""
    try:
        return json.dumps(value, sort_keys=True, default=str)
    except (ValueError, RecursionError):
        raise NotUnderstood from None


def lines_of(data: bytes) -> Iterator[str]:
    return iter(data.decode("utf-8", "replace").replace("\r\n", "\n").split("\n"))


def table_of(value: object) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise NotUnderstood
    return value


def list_of(value: object) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise NotUnderstood
    return value
