"""The one parser of host names, addresses and patterns of them.

Without one canonical form, the check and the dial would read the same bytes differently: `127.1`, `0x7f000001`,
`EXAMPLE.org.`, `[::ffff:127.0.0.1]` and `allowed.org@evil.org` are the classic ways around a list of hosts.

What comes from the wire is ASCII and strict (`parse_destination`): letters, digits and hyphens (RFC 1123 2.1), no
underscore (no certificate can name such a host), no trailing dot (clients, servers and certificates disagree on whether
it is the same host; nothing that an agent runs sends one). A person's policy (`parse_pattern`) may have upper case, one
trailing dot and Unicode, which become the canonical form, as long as there is only one.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata

from vmsandbox.egress.addresses import BadHostError, parse_address, refused_address, unmapped
from vmsandbox.egress.values import Destination

__all__ = [
    "BadHostError",
    "is_address",
    "parse_address",
    "parse_destination",
    "parse_entry",
    "parse_host",
    "parse_pattern",
    "pattern_matches",
    "patterns_for",
    "precision",
    "refused_address",
    "to_ascii",
]

MAX_HOST = 253  # RFC 1035 2.3.4, without the root's dot
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")  # what the WHATWG's URL parser takes for an IPv4 address in the last label
_PORT = re.compile(r"[1-9][0-9]{0,4}")
_DEVIATIONS = "\u00df\u03c2\u200c\u200d"  # UTS 46 2.3: other names under IDNA 2003 than under IDNA 2008


def parse_destination(untrusted: str, default_port: int | None = None) -> Destination:
    """`host`, `host:port`, `192.0.2.1:port` or `[2001:db8::1]:port`, as in CONNECT, Host, :authority and SNI.

    Args:
        default_port: when none is named; None: one has to be.

    Raises:
        BadHostError: anything that could be read in more than one way, or is no host at all.
    """
    host, port_text = _split(untrusted)
    if port_text is None and default_port is None:
        raise _bad(untrusted, "no port")
    port = default_port if port_text is None else _port(untrusted, port_text)
    assert port is not None
    if host.startswith("["):
        return Destination(_bracketed(untrusted, host), port)
    return Destination(_name_or_ipv4(untrusted, host), port)


def parse_host(untrusted: str) -> str:
    """A host without a port (a name asked of DNS, an SNI): the canonical form, as `parse_destination` gives it."""
    host, port_text = _split(untrusted)
    if port_text is not None:
        raise _bad(untrusted, "a port where none belongs")
    return parse_destination(host, 443).host


def parse_pattern(text: str) -> str:
    """A pattern of a person's policy: `example.org`, `*.example.org`, `*`, an address; canonical.

    Raises:
        BadHostError: it has a port, is a bundle, or is ambiguous.
    """
    pattern, port = parse_entry(text)
    if port is not None:
        raise _bad(text, "a port where none belongs (name it under `ports`)")
    return pattern


def parse_entry(text: str) -> tuple[str, int | None]:
    """One line of `allowed_hosts` that is no bundle: a pattern, with a port or None."""
    if text.startswith("@"):
        raise _bad(text, "a bundle where a host belongs")
    host, port_text = _split(text, ascii_only=False)
    port = None if port_text is None else _port(text, port_text)
    if host.startswith("["):
        return _bracketed(text, host), port
    if host == "*":
        return host, port
    wildcard = host.startswith("*.")
    name = to_ascii(host[2:] if wildcard else host, text)
    canonical = _name_or_ipv4(text, name)
    if wildcard and is_address(canonical):
        raise _bad(text, "an address has no subdomains")
    if wildcard and len(canonical) + 2 > MAX_HOST:
        raise _bad(text, "too long")
    return ("*." if wildcard else "") + canonical, port


def to_ascii(name: str, shown: str | None = None) -> str:
    """A person's name in lower-case A-labels, without its trailing dot.

    Refused where IDNA 2003, IDNA 2008 and UTS 46 could disagree: the A-label itself can be written then.
    """
    shown = name if shown is None else shown
    if name.endswith("."):
        name = name[:-1]
    if name.isascii():
        return name.lower()
    return ".".join(label.lower() if label.isascii() else _a_label(label, shown) for label in name.split("."))


def pattern_matches(pattern: str, host: str) -> bool:
    """Whether a canonical pattern covers a canonical host. `*.example.org` does not cover `example.org`."""
    if pattern == "*":
        return True
    if pattern.startswith("*."):
        return host.endswith(pattern[1:])
    return pattern == host


def precision(pattern: str) -> tuple[int, int]:
    """How exactly a canonical pattern names a host: greater is more exact; equal only for what is equally exact."""
    if pattern == "*":
        return (0, 0)
    return (1, pattern.count(".")) if pattern.startswith("*.") else (2, 0)


def patterns_for(host: str) -> list[str]:
    """Every pattern that can cover a canonical host, the most exact first."""
    found = [host]
    if not is_address(host):
        at = host.find(".")
        while at >= 0:
            found.append("*" + host[at:])
            at = host.find(".", at + 1)
    found.append("*")
    return found


def is_address(host: str) -> bool:
    """Whether a canonical host is an address: the last label of a name is never a number."""
    return ":" in host or host.rpartition(".")[2].isdigit()


def _split(text: str, ascii_only: bool = True) -> tuple[str, str | None]:
    if not text:
        raise _bad(text, "empty")
    if len(text) > MAX_HOST + 8:
        raise _bad(text, "too long")
    if ascii_only and not text.isascii():
        raise _bad(text, "not ASCII")
    if any(char.isspace() or not char.isprintable() for char in text):
        raise _bad(text, "a space or control character")
    for char, what in (("@", "user information"), ("%", "a percent sign or zone"), ("/", "a slash"), ("\\", "a slash")):
        if char in text:
            raise _bad(text, what)
    if text.startswith("["):
        host, closed, rest = text.partition("]")
        if not closed or (rest and not rest.startswith(":")):
            raise _bad(text, "brackets that do not fit")
        return host + "]", rest[1:] if rest else None
    host, colon, port = text.partition(":")
    if ":" in port:
        raise _bad(text, "more than one colon (an IPv6 address needs brackets)")
    return host, port if colon else None


def _port(shown: str, text: str) -> int:
    if not _PORT.fullmatch(text) or int(text) > 65535:
        raise _bad(shown, "not a port from 1 to 65535")
    return int(text)


def _bracketed(shown: str, host: str) -> str:
    try:
        return str(unmapped(ipaddress.IPv6Address(host[1:-1])))
    except ValueError:
        raise _bad(shown, "not an IPv6 address") from None


def _name_or_ipv4(shown: str, host: str) -> str:
    host = host.lower()
    if len(host) > MAX_HOST:
        raise _bad(shown, "too long")
    labels = host.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        try:
            address = str(ipaddress.IPv4Address(host))
        except ValueError:
            address = ""
        if address != host:
            raise _bad(shown, "not an IPv4 address of four decimal numbers")
        return address
    if host.endswith("."):
        raise _bad(shown, "a dot at the end")
    for label in labels:
        if not _LABEL.fullmatch(label):
            raise _bad(shown, "not a host name (letters, digits and hyphens between dots)")
        if label.startswith("xn--"):
            _check_a_label(label, shown)
    return host


def _check_a_label(label: str, shown: str) -> None:
    try:
        decoded = label[4:].encode("ascii").decode("punycode")
        again = "xn--" + decoded.encode("punycode").decode("ascii")
    except (UnicodeError, ValueError, OverflowError):
        decoded, again = "", ""
    if again != label or decoded.isascii() or decoded != unicodedata.normalize("NFKC", decoded).lower():
        raise _bad(shown, "not an internationalised name (xn--) in its one form")
    if not decoded.isprintable() or any(char.isspace() or char in "./@:\u3002" for char in decoded):
        raise _bad(shown, "an internationalised name (xn--) with characters that no name has")


def _a_label(label: str, shown: str) -> str:
    from encodings.idna import ToASCII, ToUnicode

    if any(char in label for char in _DEVIATIONS):
        raise _bad(shown, "a name with more than one ASCII form: write the one that is meant (xn--…)")
    low = label.lower()
    try:
        ascii_label = ToASCII(low).decode("ascii")
        back = ToUnicode(ascii_label)
    except UnicodeError:
        raise _bad(shown, "not an internationalised name of before 2008: write its ASCII form (xn--…)") from None
    # What would be mapped to something else (full-width letters, ligatures, unassigned) is not what the person reads.
    if back != low or not ascii_label.startswith("xn--"):
        raise _bad(shown, "a name that is not in its normal form: write its ASCII form (xn--…)")
    return ascii_label


def _bad(shown: str, why: str) -> BadHostError:
    quoted = ascii(shown[:100])
    return BadHostError(f"not a host: {quoted}: {why}", details=why)
