"""JSON with comments and trailing commas, as devcontainer.json has them, made plain JSON.

Without it the files that people have could not be read: json.loads takes neither. Lines stay where they are.
"""

from __future__ import annotations

import re

# A text, a comment of either kind, space, or one other character. Each is found without going back.
_TOKEN = re.compile(r'"(?:[^"\\\n]|\\.)*"|//[^\n]*|/\*(?:[^*]|\*(?!/))*\*/|\s+|.', re.DOTALL)


def plain_json(text: str) -> str:
    """The same without comments and trailing commas; what is no JSON stays so."""
    found: list[str] = []
    comma = -1  # where the last one is, with nothing but space and comments behind it
    for match in _TOKEN.finditer(text):
        piece = match[0]
        if piece.startswith(("//", "/*")):
            piece = "\n" * piece.count("\n") or " "
        elif piece in "}]" and comma >= 0:
            found[comma] = " "
        if not piece.isspace():
            comma = len(found) if piece == "," else -1
        found.append(piece)
    return "".join(found)
