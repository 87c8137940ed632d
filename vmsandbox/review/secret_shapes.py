"""Keys and tokens by their known shapes (`secret_shapes.yaml`), and assignments of what looks random.

Without it a key that an agent found, or made, would be committed. A finding never repeats the secret: findings are
written into journals and reports.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from vmsandbox.review.linear import Hit, LinePattern, PatternSet, compiled, one_line_end

_LIST = Path(__file__).with_name("secret_shapes.yaml")
_SHOWN = 4  # characters of a secret
_RANDOM = 3.3  # bits a character: English words in snake_case have about 3, 20 random characters of base64 over 4
_SAMPLE = ("example", "changeme", "placeholder", "your", "xxxx", "dummy", "redacted", "${", "{{", "<")


class Shape(NamedTuple):
    """One shape. group: matches the same with the part in brackets apart, or None. entropy: see the list."""

    name: str
    pattern: LinePattern
    group: Any
    entropy: bool


class Secret(NamedTuple):
    """Where something looks like a secret. start: of the secret itself. begins: what may be shown of it."""

    name: str
    start: int
    end: int
    begins: str


@cache
def shapes() -> tuple[Shape, ...]:
    """The list that is shipped with vmsandbox."""
    import yaml

    data = yaml.load(_LIST.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506
    return tuple(_shape(one["name"], one["pattern"], one.get("entropy")) for one in data["shapes"])


@cache
def _all() -> PatternSet:
    return PatternSet([shape.pattern for shape in shapes()])


def _shape(name: str, pattern: str, entropy: bool | None) -> Shape:
    line = LinePattern(pattern)
    return Shape(name, line, None if entropy is None else compiled(line.source, groups=True), bool(entropy))


def secrets_in(data: bytes, limit: int) -> list[Secret]:
    """What looks like a secret, in the order of the text: at most `limit` of each shape, one of a shape a line.

    data: lines as `one_line_end` makes them.
    """
    found: list[Secret] = []
    for number, hits in _all().hits(data):
        # Judged before they are counted: samples must not use up the places of real ones.
        real = (secret for hit in hits if (secret := _judged(shapes()[number], data, hit)) is not None)
        found += islice(real, limit)
    apart: list[Secret] = []
    for one in sorted(found, key=lambda one: (one.start, -one.end)):
        if not apart or one.start >= apart[-1].end:  # a known shape in an assignment is one secret
            apart.append(one)
    return apart


def redacted(untrusted: bytes) -> str:
    """The text with everything that looks like a secret cut to its first characters."""
    data = one_line_end(untrusted.decode("utf-8", "replace").encode())
    out: list[bytes] = []
    at = 0
    for one in secrets_in(data, len(data)):
        out += [data[at : one.start], one.begins.encode(), "…".encode()]
        at = one.end
    return b"".join((*out, data[at:])).decode("utf-8", "replace")


def _judged(shape: Shape, data: bytes, hit: Hit) -> Secret | None:
    start, end = hit
    if shape.group is not None and (match := shape.group.search(data, start, end + 2)) is not None:
        start, end = match.span(1)
    secret = data[start:end].decode("utf-8", "replace")
    if shape.group is not None and not _is_real(secret, shape.entropy):
        return None
    return Secret(shape.name, start, end, secret[:_SHOWN])


def _is_real(value: str, must_be_random: bool) -> bool:
    low = value.lower()
    if any(word in low for word in _SAMPLE) or len(set(value)) < 5:
        return False
    if not must_be_random:
        return True
    counts = Counter(value)
    bits = -sum(count / len(value) * math.log2(count / len(value)) for count in counts.values())
    return bits >= _RANDOM and any(character.isdigit() for character in value) and any(map(str.isalpha, value))
