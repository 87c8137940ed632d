"""Where each value of a merged policy comes from.

Without it nobody could tell whether it is the project, the person or the organisation that says no.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vmsandbox.policy.format.rendering import plain_policy
from vmsandbox.policy.format.strictyaml import KeyPath
from vmsandbox.policy.layer import Layer
from vmsandbox.policy.values import Policy

DEFAULT = "default"
# Lists that are one value.
_WHOLE = (("session", "post_create"), ("session", "healthcheck", "test"))


def origins(policy: Policy, layers: Sequence[Layer]) -> dict[KeyPath, tuple[str, ...]]:
    """Where the values of a policy stand: by the way to each key and list entry, `file:line` or `default`.

    Several where files say the same, or where none says quite what became of them together.

    Args:
        policy: merged of the layers.
        layers: the files, the widest first.
    """
    folder = policy.source.parent if policy.source else Path("/")
    plains = [(layer, plain_policy(layer.policy, folder, complete=True)) for layer in layers]
    whole = plain_policy(policy, folder, complete=True)
    return {where: _origin(where, value, plains) for where, value in _leaves(whole, ())}


def dotted(where: KeyPath) -> str:
    """`network.rules[0]`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where)
    return text.removeprefix(".")


def _leaves(value: Any, where: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, dict) and (value or len(where) < 2):
        for name, inner in value.items():
            yield from _leaves(inner, (*where, name))
        return
    yield where, value
    if isinstance(value, list) and where not in _WHOLE:
        for number, item in enumerate(value):
            yield (*where, number), item


def _origin(where: KeyPath, value: Any, plains: list[tuple[Layer, dict[str, Any]]]) -> tuple[str, ...]:
    key = tuple(part for part in where if not isinstance(part, int))
    saying = [(layer, _at(plain, key)) for layer, plain in plains if layer.says(".".join(map(str, key)))]
    if not saying:
        return (DEFAULT,)
    if where == key:
        same = [_place(layer, key) for layer, theirs in saying if theirs == value]
    else:
        same = [
            _place(layer, (*key, theirs.index(value)), len(theirs))
            for layer, theirs in saying
            if isinstance(theirs, list) and value in theirs
        ]
    return tuple(same) or tuple(_place(layer, key) for layer, _ in saying)


def _place(layer: Layer, where: KeyPath, length: int = 0) -> str:
    """The file and line of a key or entry; of the key where entries are not the file's one by one."""
    lines = layer.lines
    way: KeyPath = ("sandbox", *where)
    if isinstance(where[-1], int) and (way not in lines or (*way[:-1], length) in lines):
        way = way[:-1]
    return f"{layer.source}:{lines.get(way, '?')}"


def _at(plain: dict[str, Any], key: KeyPath) -> Any:
    found: Any = plain
    for part in key:
        found = found.get(part) if isinstance(found, dict) else None
    return found
