"""The single words of `sandbox.network`, checked and made canonical. Each raises ValueError with what to write instead.

Without a message that knows what people mean by `https://pypi.org/` or `.pypi.org`, a refused policy would be widened
to `*` until it loads.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from vmsandbox.egress.bundles import bundle_names, bundles
from vmsandbox.egress.hosts import BadHostError, parse_address, parse_destination, parse_entry
from vmsandbox.egress.paths import BadPathError, parse_glob
from vmsandbox.egress.values import Destination

TLS = ("auto", "inspect", "passthrough")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_METHOD = re.compile(r"[A-Z]{1,32}(?:-[A-Z]{1,32})*")
_HEADER = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]{1,64}")  # RFC 9110 5.6.2, lower case as in HTTP/2
_PACKAGE = re.compile(r"(?:(?:pypi|npm|debian|crates):)?[A-Za-z0-9*?@/._+\-\[\]!]{1,214}")
# What a value in one of them would do is not "authenticate".
_NO_SECRET_HEADERS = frozenset(
    {"host", "connection", "content-length", "transfer-encoding", "upgrade", "te", "trailer"}
)


def entry(text: str) -> str:
    """`name`, `*.name`, `*`, an address, each with or without a port, or a bundle."""
    if text.startswith("@"):
        return _bundle(text)
    try:
        pattern, port = parse_entry(text)
    except BadHostError as error:
        raise ValueError(f"{error.brief}{_hint(text)}") from None
    if port is None:
        return f"[{pattern}]" if ":" in pattern else pattern
    return str(Destination(pattern, port))


def pattern(text: str) -> str:
    """The same without a port; an address without its brackets."""
    if text.startswith("@"):
        return _bundle(text)
    try:
        found, port = parse_entry(text)
    except BadHostError as error:
        raise ValueError(f"{error.brief}{_hint(text)}") from None
    if port is not None:
        raise ValueError(f"a port does not belong here: `ports: [{port}]` beside `host` does")
    return found


def secret_host(text: str) -> str:
    """A host that a secret is sent to: never any."""
    found = pattern(text)
    if found == "*":
        raise ValueError("a secret is for hosts that are named, not for any")
    return found


def method(text: str) -> str:
    """An HTTP method, in upper case."""
    found = text.upper()
    if not _METHOD.fullmatch(found) or found in ("CONNECT", "TRACE"):
        raise ValueError(f"not a method that a request may have: {text[:40]!a}")
    return found


def path(text: str) -> str:
    """A glob on paths."""
    try:
        return parse_glob(text)
    except BadPathError as error:
        raise ValueError(error.brief) from None


def address(text: str) -> str:
    """An IP address."""
    try:
        return parse_address(text.removeprefix("[").removesuffix("]") if text.startswith("[") else text)
    except BadHostError as error:
        raise ValueError(error.brief) from None


def resolver(text: str) -> str:
    """A DNS server's address, with or without a port; always with one in the canonical form."""
    try:
        host, port = parse_destination(f"[{text}]" if text.count(":") > 1 and "[" not in text else text, 53)
        return str(Destination(parse_address(host), port))
    except BadHostError:
        raise ValueError(f"not an IP address with or without a port: {text[:60]!a}") from None


def package(text: str) -> str:
    """A glob on packages: `name` or `ecosystem:name`."""
    if not _PACKAGE.fullmatch(text):
        known = "pypi, npm, debian, crates"
        raise ValueError(f"not a package, or an ecosystem that is none of {known}: {text[:60]!a}")
    return text


def header(text: str) -> str:
    """A header's name, in lower case."""
    found = text.lower()
    if not _HEADER.fullmatch(found) or found in _NO_SECRET_HEADERS:
        raise ValueError(f"not a header that a secret may be in: {text[:60]!a}")
    return found


def prefix(text: str) -> str:
    """What precedes a secret in its header. Not repeated when it is wrong: it may be part of the secret."""
    if len(text) > 64 or not text.isascii() or not text.isprintable():
        raise ValueError("a prefix has at most 64 printable ASCII characters")
    return text


def variable(text: str) -> str:
    """The name of an environment variable. Not repeated when it is wrong: people write the secret here."""
    if not _VARIABLE.fullmatch(text):
        raise ValueError("not the name of a variable (letters, digits and _; the secret itself never stands here)")
    return text


def not_the_secret_itself(value: object) -> object:
    """`from` has to be a mapping; whatever else it is, is not repeated."""
    if not isinstance(value, dict):
        raise ValueError("one of {env: NAME}, {file: PATH} and {command: [PROGRAM, …]}, never the secret itself")
    return value


def tls(text: str) -> str:
    """What is done with TLS."""
    if text not in TLS:
        close = difflib.get_close_matches(text, TLS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(TLS)}"
        raise ValueError(f"not a way to treat TLS: {text[:40]!a} ({hint})")
    return text


def check_narrowed(name: str, ports: Sequence[int], methods: Sequence[str]) -> None:
    """A bundle of which a rule would leave nothing."""
    for rule in bundles()[name[1:]]:
        if (not ports or set(ports) & set(rule.ports)) and (not methods or set(methods) & set(rule.methods)):
            return
    raise ValueError(f"nothing of {name} is left: it has none of these ports and methods")


def _bundle(text: str) -> str:
    known = bundle_names()
    if text not in known:
        close = difflib.get_close_matches(text.lower(), known, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else f" (there are {', '.join(known)})"
        raise ValueError(f"no bundle is called {text[:40]!a}{hint}")
    return text


def _hint(text: str) -> str:
    if "://" in text:
        text = text.partition("://")[2]
        host = text.partition("/")[0]
        return f" (write the host alone: {host[:100]!a}; paths go into `rules`)"
    if "/" in text:
        return f" (write the host alone: {text.partition('/')[0][:100]!a}; paths go into `rules`)"
    if text.startswith("."):
        return f" (subdomains are written {('*' + text)[:100]!a})"
    if "*" in text:
        return " (a * stands alone or as *. in front of a name)"
    return ""
