"""The named bundles of `bundles.yaml`: `@pypi` and the like, as rules.

Without them every project would list the hosts of its tools by trial, and with write access to all of them.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from vmsandbox.egress.hosts import parse_pattern
from vmsandbox.egress.paths import parse_glob
from vmsandbox.egress.values import HostRule

_FILE = Path(__file__).with_name("bundles.yaml")
_READ = ("GET", "HEAD")


@cache
def bundles() -> dict[str, tuple[HostRule, ...]]:
    """Every bundle by its name without the `@`; the source of its rules is the name with it."""
    return {name: tuple(_rule(name, one) for one in bundle["hosts"]) for name, bundle in _read().items()}


def bundle_names() -> tuple[str, ...]:
    """The names as they stand in a policy: `@pypi`, …"""
    return tuple(f"@{name}" for name in _read())


def about(name: str) -> str:
    """What a bundle (without the `@`) is for, in a few words."""
    return str(_read()[name]["about"])


@cache
def _read() -> dict[str, dict]:  # type: ignore[type-arg]
    import yaml

    data: dict[str, dict] = yaml.load(  # type: ignore[type-arg]
        _FILE.read_bytes(),
        Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader),  # noqa: S506
    )
    return data


def _rule(name: str, entry: dict[str, object]) -> HostRule:
    return HostRule(
        parse_pattern(str(entry["host"])),
        ports=tuple(_list(entry.get("ports", [443]), int)),
        methods=tuple(_list(entry.get("methods", _READ), str)),
        paths=tuple(parse_glob(one) for one in _list(entry.get("paths", []), str)),
        source=f"@{name}",
    )


def _list(value: object, kind: type) -> list:  # type: ignore[type-arg]
    assert isinstance(value, list | tuple) and all(isinstance(one, kind) for one in value), value
    return list(value)
