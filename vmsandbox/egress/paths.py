"""What the path of a request means to a rule about paths.

Without it `/simple/..%2fadmin`, `//admin` or `/simple/..;/admin` would pass as "below /simple/" here and be something
else to the server. A path that can be read in more than one way has several *readings*; a rule about paths lets it
through only if each of them is allowed. What is worse than ambiguous has none, and is refused.
"""

from __future__ import annotations

import re

from vmsandbox.egress.hosts import BadHostError

MAX_PATH = 64 << 10
SLASH = "%2F"  # how an encoded slash stands in a reading and in a glob
_RAW = re.compile(r"/(?:[!$&'()*+,\-./0-9:;=@A-Z_a-z~|\[\]{}^\"<>`]|%[0-9A-Fa-f]{2})*")
_ESCAPED = re.compile(r"%([0-9A-Fa-f]{2})")
_STILL_ESCAPED = re.compile(r"%[0-9A-Fa-f]{2}")
_ENCODED_SLASH = re.compile(r"%2[Ff]")


class BadPathError(BadHostError):
    """No path that a rule could be applied to."""


def readings(untrusted: str) -> tuple[str, ...]:
    """What a server may take this path for: percent-decoded once, an encoded slash as a slash and as itself.

    Args:
        untrusted: the request's path, still encoded; from the first `?` on it is ignored.

    Raises:
        BadPathError: dot segments, `//`, backslashes, control characters, what is not UTF-8, and what would change
            again if it was decoded twice.
    """
    path = untrusted.partition("?")[0]
    if len(path) > MAX_PATH:
        raise BadPathError("the path is too long")
    if not _RAW.fullmatch(path):
        raise BadPathError(f"not a path: {path[:100]!a}")
    decoded = _decoded(path)
    found = [decoded]
    if _ENCODED_SLASH.search(path):
        found.append(SLASH.join(_decoded(part) for part in _ENCODED_SLASH.split(path)))
    for one in found:
        _refuse_ambiguous(one, path)
    return tuple(found)


def parse_glob(text: str) -> str:
    """A person's glob on paths in canonical form: `/simple/*`; `*` is any characters, `/` too.

    Raises:
        BadPathError: it could never match, or has what no path has.
    """
    if not text.startswith(("/", "*")):
        raise BadPathError(f"a path begins with /, not {text[:40]!a}")
    if any(char.isspace() or not char.isprintable() or char in "?#\\" for char in text):
        raise BadPathError("a path has no spaces, no backslashes and nothing from ? or # on")
    if re.search("%2a", text, re.IGNORECASE):
        raise BadPathError("a path with an encoded * cannot be named")
    parts = _ENCODED_SLASH.split(text)
    glob = SLASH.join(_decoded(part) if "%" in part else part for part in parts)
    while "**" in glob:
        glob = glob.replace("**", "*")
    _refuse_ambiguous(glob, text)
    return glob


def glob_matches(glob: str, reading: str) -> bool:
    """Whether a glob covers a reading; time is linear in the path for each `*`."""
    first, *rest = glob.split("*")
    if not rest:
        return glob == reading
    if not reading.startswith(first) or len(reading) < len(first) + len(rest[-1]):
        return False
    at = len(first)
    end = len(reading) - len(rest[-1])
    for part in rest[:-1]:
        at = reading.find(part, at, end)
        if at < 0:
            return False
        at += len(part)
    return at <= end and reading.endswith(rest[-1])


def _decoded(path: str) -> str:
    raw = b"".join(
        bytes([int(piece, 16)]) if number % 2 else piece.encode("utf-8")
        for number, piece in enumerate(_ESCAPED.split(path))
    )
    try:
        decoded = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise BadPathError(f"the path is not UTF-8: {path[:100]!a}") from None
    if _STILL_ESCAPED.search(decoded):
        raise BadPathError(f"the path is encoded twice: {path[:100]!a}")
    return decoded


def _refuse_ambiguous(path: str, shown: str) -> None:
    why = ""
    if "//" in path:
        why = "it has //"
    elif any(segment.partition(";")[0] in (".", "..") for segment in path.replace(SLASH, "/").split("/")):
        why = "it has . or .. between slashes"
    elif "\\" in path or "?" in path or "#" in path:
        why = "it has an encoded \\, ? or #"
    elif any(ord(char) < 32 or ord(char) == 127 for char in path):
        why = "it has control characters"
    if why:
        raise BadPathError(f"the path could be read in more than one way, {why}: {shown[:100]!a}")
