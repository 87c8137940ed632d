"""Shell-style globs as regular expressions over whole paths.

`fnmatch` alone lets `*` run over slashes, so that `./*.key` would mean less or more than a person reads
in it. `*` and `?` stay within one component, `**` spans any number of them, `[…]` and `[!…]` are
character classes.
"""

from __future__ import annotations

import re

_MAGIC = re.compile(r"[*?\[]")


def is_glob(text: str) -> bool:
    """Whether the text has any character with a meaning of its own."""
    return _MAGIC.search(text) is not None


def translate(glob: str) -> str:
    """A regular expression (for `re.fullmatch` with DOTALL) that matches what the glob matches."""
    out = []
    at = 0
    while at < len(glob):
        if glob.startswith("**/", at) and (at == 0 or glob[at - 1] == "/"):
            out.append("(?:.*/)?")
            at += 3
        elif glob.startswith("**", at):
            out.append(".*")
            at += 2
        elif glob[at] == "*":
            out.append("[^/]*")
            at += 1
        elif glob[at] == "?":
            out.append("[^/]")
            at += 1
        elif glob[at] == "[" and (end := glob.find("]", at + 3 if glob[at + 1 : at + 2] in "!^" else at + 2)) > 0:
            out.append(_character_class(glob[at + 1 : end]))
            at = end + 1
        else:
            out.append(re.escape(glob[at]))
            at += 1
    return "".join(out)


def _character_class(inside: str) -> str:
    negated = inside[0] in "!^"
    members = inside[1:] if negated else inside
    escaped = re.sub(r"([\\\[\]^&~|])", r"\\\1", members)
    try:
        re.compile(f"[{escaped}]")
    except re.error:  # a range that runs backwards, such as [z-a]
        escaped = re.escape(members)
    # On purpose: neither form matches a slash, whatever the range.
    return f"(?!/)[{'^' if negated else ''}{escaped}]"
