"""The small notations of compose files and of docker: sizes, times, tmpfs and volume options, variables.

Without one reader for each, `--tmpfs` and `tmpfs:` would be understood differently.
"""

from __future__ import annotations

import re
from typing import Any

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([kmgt]?)(?:i?b)?", re.IGNORECASE)
_FACTOR = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_TIME = re.compile(r"(?:[0-9]+(?:\.[0-9]+)?(?:us|ms|s|m|h))+")
_PART = re.compile(r"([0-9.]+)(us|ms|s|m|h)")
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600}
_VARIABLE = re.compile(r"(?<!\$)(?:\$\$)*\$(?!\$)")
_SECRET_NAME = re.compile(r"(?i)key|token|secret|passw|passphrase|credential|auth|private|cookie|dsn|pwd|cert|salt")
_SECRET_VALUE = re.compile(r"://[^/\s]*@|-----BEGIN|[A-Za-z0-9+/=_-]{24,}")


def shown(value: object) -> str:
    """A value of the file in a message: short, no control characters."""
    text = value if isinstance(value, str) else repr(value)
    return ascii(text)[1:-1] if len(text) <= 60 else ascii(text[:57])[1:-1] + "..."


def depends(text: str) -> bool:
    """Whether a text has `$NAME` or `${NAME}` in it, which only the host could fill in."""
    return _VARIABLE.search(text) is not None


def size(value: Any) -> int | None:
    """Bytes of `2G`, `512mb`, `1073741824`; None: it is no size."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value if value > 0 else None
    if isinstance(value, float):
        return int(value) if value > 0 else None
    match = _SIZE.fullmatch(value) if isinstance(value, str) and len(value) < 40 else None
    return int(float(match[1]) * _FACTOR[match[2].lower()]) or None if match else None


def seconds(value: Any) -> float | None:
    """Seconds of `1m30s`, `500ms`; None: it is no time."""
    if not isinstance(value, str) or len(value) > 40 or not _TIME.fullmatch(value):
        return None
    try:
        return round(sum(float(number) * _SECONDS[unit] for number, unit in _PART.findall(value)), 6) or None
    except ValueError:
        return None


def number(value: Any) -> float | None:
    """A positive number, also when it is written as text (`'2.0'`)."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except ValueError:
        return None
    return found if 0 < found < 1e15 else None


def secret(name: str, value: str) -> bool:
    """Whether a variable's value must not be copied into a policy: by its name, or by how it looks."""
    return bool(_SECRET_NAME.search(name) or _SECRET_VALUE.search(value))


def options(text: str) -> dict[str, str]:
    """`noexec,size=100m` as names and values."""
    found = {}
    for one in text.split(","):
        name, _, value = one.strip().partition("=")
        if name:
            found[name] = value
    return found
