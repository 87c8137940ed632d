"""Puts a secret's value in the place of its placeholder, in the one header of the few hosts that it is for.

Without it the guest would have to hold the value itself. Strict on purpose: only over TLS, whatever the policy names
(over plain HTTP anyone on the way reads the value); only where the whole header is prefix and placeholder, or `Basic`
with the placeholder as user or password (git, pip). A placeholder anywhere else stays one and is refused by `dlp.py`.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vmsandbox.egress.dlp import OUTSIDE, Finding
from vmsandbox.egress.hosts import pattern_matches
from vmsandbox.egress.values import Destination, SecretUse

Headers = list[tuple[str, str]]
_BASIC = "basic "


class Filled(NamedTuple):
    """headers: to send upstream, with values; never to be logged. bare: the same without the placeholders, to scan.

    refusal: why a placeholder in its right place gets no value.
    """

    headers: Headers
    bare: Headers
    refusal: Finding | None


class _Place(NamedTuple):
    """A header's value with something else in the placeholder's place."""

    bare: str
    full: str


def fill_in(
    uses: Sequence[SecretUse], values: Mapping[str, str], to: Destination, method: str, headers: Headers, tls: bool
) -> Filled:
    """The headers with the values that belong there.

    Args:
        values: name → value; never in a message.
        tls: whether what is sent to `to` is encrypted.
    """
    full: Headers = []
    bare: Headers = []
    refusal: Finding | None = None
    for name, value in headers:
        place = _Place(value, value)
        for use in uses:
            if not _is_for(use, to, method, name) or (found := _place(use, value, values.get(use.name, ""))) is None:
                continue
            if not tls:
                why = "is never sent without TLS: use https"
            elif not values.get(use.name):
                why = "has no value on the host"
            else:
                place = found
                break
            what = f"the secret {use.name}, which {why}"
            place = _Place(found.bare, value)
            refusal = refusal or Finding(OUTSIDE, what, what, f"header {name}", is_hit=False)
        full.append((name, place.full))
        bare.append((name, place.bare))
    return Filled(full, bare, refusal)


def _is_for(use: SecretUse, to: Destination, method: str, header: str) -> bool:
    return header.lower() == use.header and (not use.methods or method in use.methods) and is_for_host(use, to)


def is_for_host(use: SecretUse, to: Destination) -> bool:
    """Whether a secret is for this host at all."""
    return any(pattern_matches(pattern, to.host) for pattern in use.hosts)


def _place(use: SecretUse, untrusted: str, value: str) -> _Place | None:
    text = untrusted.strip()
    start = len(use.prefix)
    if text[start:] == use.placeholder and text[:start].lower() == use.prefix.lower():
        return _Place(use.prefix, use.prefix + value)
    if text[: len(_BASIC)].lower() != _BASIC:
        return None
    try:
        user, colon, password = b64decode(text[len(_BASIC) :].strip(), validate=True).decode().partition(":")
    except ValueError:
        return None
    if use.placeholder not in (user, password):
        return None

    def credentials(inside: str) -> str:
        pair = (inside if one == use.placeholder else one for one in (user, password))
        return "Basic " + b64encode(colon.join(pair).encode()).decode()

    return _Place(credentials(""), credentials(value))
