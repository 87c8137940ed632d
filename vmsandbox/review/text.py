"""Text that came from a guest, made safe and unambiguous for a terminal.

A file name may hold an escape sequence that rewrites the screen, a right-to-left override that shows
`exe.txt` for `txt.exe`, or bytes that are no text at all. Everything that a guest chose goes through here
before a person sees it.
"""

from __future__ import annotations

import unicodedata

# Letters and signs that look like nothing, although Unicode calls them printable.
_INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
_VARIATION_SELECTORS = (range(0x180B, 0x1810), range(0xFE00, 0xFE10), range(0xE0100, 0xE01F0))


def shown(text: str, limit: int | None = None) -> str:
    r"""The text on one line, with all that does not show as itself escaped: `\x1b`, `\u202e`, `\\`.

    Bytes that were not UTF-8 (surrogate escapes) become `\xff`. Different texts stay different. With
    `limit`, a longer result is cut and ends in "…".
    """
    if limit is not None:
        text, whole = text[: limit + 1], text
    else:
        whole = text
    if text.isascii() and text.isprintable() and "\\" not in text:
        safe = text
    else:
        safe = "".join(
            _visible(character, first=position == 0 or text[position - 1] == "/")
            for position, character in enumerate(text)
        )
    if limit is not None and (len(safe) > limit or len(whole) > len(text)):
        return safe[: max(limit - 1, 0)] + "…"
    return safe


def shown_bytes(untrusted_bytes: bytes, limit: int | None = 200) -> str:
    """`shown` for bytes that may or may not be UTF-8."""
    if limit is not None:
        untrusted_bytes = untrusted_bytes[: limit * 4 + 4]
    return shown(untrusted_bytes.decode("utf-8", "surrogateescape"), limit)


def _visible(character: str, first: bool) -> str:
    code = ord(character)
    if character == "\\":
        return "\\\\"
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    plain = (
        character.isprintable()
        and character not in _INVISIBLE
        and not any(code in selectors for selectors in _VARIATION_SELECTORS)
        # A combining mark at the start would change what stands before it on the line.
        and not (first and unicodedata.category(character).startswith("M"))
    )
    if plain:
        return character
    if code <= 0x7F:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
