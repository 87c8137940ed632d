"""Characters that make text look like other text: Trojan Source, invisible payloads, letters of another alphabet.

Without it `if access_level != "user‮ ⁦# admin⁩ ⁦"` reads as something else than what runs (CVE-2021-42574,
https://trojansource.codes), instructions to an agent hide in tag characters, and `раypal` is not `paypal`.

Text in any language raises no alarm by itself: joiners between letters that need them, emoji sequences and words of one
alphabet are as they should be. Sources: UTS #39 (confusables), UTS #51 (emoji sequences), UAX #9 (bidi).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

_BIDI = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_JOINERS = "\u200c\u200d"
_INVISIBLE = (
    "\u00ad\u034f\u070f\u115f\u1160\u17b4\u17b5\u180e\u200b\u2028\u2029\u2060-\u2065\u206a-\u206f\u2800\u3164\ufeff"
    "\uffa0\ufff0-\ufffb\U00013430-\U00013438\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
)
_TAGS = "\U000e0000-\U000e00ff"  # assigned or not: none of them shows
_SELECTORS = "\u180b-\u180d\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef"
_PRIVATE = "\ue000-\uf8ff\U000f0000-\U000ffffd\U00100000-\U0010fffd"
_NOT_CHARACTERS = "\ufdd0-\ufdef\ufffe\uffff" + "".join(
    chr((plane << 16) + 0xFFFE) + chr((plane << 16) + 0xFFFF) for plane in range(1, 17)
)
# Signs that look like those that programs are made of: click letters for `!` and `|`, a question mark for a semicolon.
_SIGNS = "\u01c3\u01c0\u037e\ua789\u29f8\u29f5\u2215\u2024"
_SUSPICIOUS = re.compile(f"[{_BIDI}{_JOINERS}{_INVISIBLE}{_TAGS}{_SELECTORS}{_PRIVATE}{_NOT_CHARACTERS}{_SIGNS}]")
_HIDDEN = f"{_BIDI}{_JOINERS}{_INVISIBLE}{_TAGS}{_SELECTORS}"
_IS_HIDDEN = re.compile(f"[{_HIDDEN}]")
# What no text of any language needs: turning its direction (UAX #9 X1-X8), tags, whole runs of what does not show.
PLANTED = f"[\u202a-\u202e\u2066-\u2069{_TAGS}]|[{_HIDDEN}]{{4}}"
_PLANTED = re.compile(PLANTED)
_KINDS = tuple(
    (re.compile(f"[{members}]"), what)
    for members, what in (
        (_BIDI, "changes the direction of the text"),
        (_TAGS, "is a tag character, which does not show"),
        (_SELECTORS, "is a variation selector where there is nothing to vary"),
        (_JOINERS + _INVISIBLE, "does not show"),
        (_PRIVATE, "has no meaning of its own (private use)"),
        (_NOT_CHARACTERS, "is no character"),
        (_SIGNS, "looks like another sign"),
    )
)
# Writing systems in which joiners between letters change how they are written.
_JOINING = ("ARABIC", "SYRIAC", "DEVANAGARI", "BENGALI", "GURMUKHI", "GUJARATI", "ORIYA", "TAMIL", "TELUGU",
            "KANNADA", "MALAYALAM", "SINHALA", "MYANMAR", "KHMER", "MONGOLIAN", "TIBETAN", "THAANA", "NKO",
            "JAVANESE")  # fmt: skip
_LATIN = "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff"
_MARKS = "\u0300-\u036f"
_CYRILLIC = "\u0400-\u052f\u1c80-\u1c88\u2de0-\u2dff\ua640-\ua69f"
# Letters of other alphabets that pass for Latin ones (UTS #39, confusables.txt).
_CYRILLIC_TWINS = "\u0405\u0406\u0408\u0410\u0412\u0415\u0417\u0417\u041a\u041c-\u041e\u0420-\u0423\u0425\u0430\u0433\u0435\u043e\u043f\u0440\u0441\u0443\u0445\u0455\u0456\u0458\u04ae\u04af\u04bb\u04c0\u04cf\u0501\u051b\u051d"  # noqa: E501
_GREEK_TWINS = "\u0370\u037f\u0391\u0392\u0395-\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7\u03b1\u03b3\u03b9\u03ba\u03bd\u03bf\u03c1\u03c5\u03f2\u03f3\u03f9\u03fa"  # noqa: E501
_OTHER_TWINS = "\u0251\u0261\u0578\u057d\u0585\u0563\u0566\u0570\u13a0-\u13f5\u1d00-\u1d22\u2c80-\u2cb1\ua4d0-\ua4f7"
_STYLED = "\uff21-\uff3a\uff41-\uff5a\U0001d400-\U0001d7cb\u2102\u210a-\u2113\u2115\u2119-\u211d\u2124\u212a\u212c-\u2131\u24b6-\u24e9"  # noqa: E501
_FOREIGN = f"{_CYRILLIC}{_GREEK_TWINS}{_OTHER_TWINS}{_STYLED}"
# A Latin letter next to one of another alphabet. One step from each letter: linear.
_MIXED = re.compile(f"[{_LATIN}][{_MARKS}]{{0,8}}[{_FOREIGN}]|[{_FOREIGN}][{_MARKS}]{{0,8}}[{_LATIN}]")
# Python takes both for ordinary letters (PEP 3131). Full-width ones belong into Chinese and Japanese text.
_STYLED_WORD = re.compile("[\U0001d400-\U0001d7cb]{2}")
_WIDE_WORD = re.compile("[\uff21-\uff3a\uff41-\uff5a]{2}")
_EAST_ASIAN = re.compile("[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]")
_TWINS = re.compile(f"[{_CYRILLIC_TWINS}]|[{_GREEK_TWINS}{_OTHER_TWINS}]{{2}}")
_CLEARLY_OTHER = re.compile(
    f"(?![{_CYRILLIC_TWINS}])[{_CYRILLIC}]"
    f"|(?![{_GREEK_TWINS}])[\u0386-\u03ff\u1f00-\u1fff]"
    f"|(?![{_OTHER_TWINS}])[\u0531-\u058f\u1400-\u167f]"
)
_STYLED_TEXT = "styled letters in place of ordinary ones; programs may take them for the same"
_HAS_LATIN = re.compile("[A-Za-z]")


class Suspicion(NamedTuple):
    """offset: into the text. text: for people, safe to show."""

    offset: int
    text: str


def suspicions(text: str, first_of_file: bool = False) -> Iterator[Suspicion]:
    """What is suspicious, characters first, then words; each in the order of the text, the first one of each line.

    first_of_file: the text begins where the file does, so that a byte order mark there is as it should be.
    """
    if text.isascii():
        return
    yield from _out_of_order(_SUSPICIOUS, text, first_of_file)
    for found in first_in_lines(_MIXED, text):
        yield Suspicion(found.start(), _mixed(found[0]))
    for found in first_in_lines(_STYLED_WORD, text):
        yield Suspicion(found.start(), _STYLED_TEXT)
    for found in first_in_lines(_WIDE_WORD, text):
        start = text.rfind("\n", 0, found.start()) + 1
        if not _EAST_ASIAN.search(text, start, line_end(text, start)):
            yield Suspicion(found.start(), _STYLED_TEXT)
    if _TWINS.search(text):
        yield from _twins(text)


def hidden(text: str, first_of_file: bool = False) -> Iterator[Suspicion]:
    """What does not show, or turns the text, and does not belong where it is: the first one of each line."""
    yield from _out_of_order(_IS_HIDDEN, text, first_of_file)


def planted(text: str) -> Iterator[Suspicion]:
    """What is hidden and has no business in a text of any language (`PLANTED`): the first one of each line."""
    yield from _out_of_order(_PLANTED, text, first_of_file=False)


def _out_of_order(pattern: re.Pattern[str], text: str, first_of_file: bool) -> Iterator[Suspicion]:
    at = 0
    while (found := pattern.search(text, at)) is not None:
        at = found.start() + 1
        starts_file = first_of_file and found.start() == 0 and found[0] == "\ufeff"
        if not starts_file and not _is_in_order(text, found.start()):
            yield Suspicion(found.start(), f"U+{ord(found[0][0]):04X} {_what(found[0][0])}")
            at = line_end(text, at)


def first_in_lines(pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    """The first match in each line: what hides something is often repeated a hundred thousand times."""
    at = 0
    while (found := pattern.search(text, at)) is not None:
        yield found
        at = line_end(text, found.end())


def line_end(text: str, at: int) -> int:
    """Where the line ends that this offset is in."""
    end = text.find("\n", at)
    return end if end >= 0 else len(text)


def _what(character: str) -> str:
    what = next(what for members, what in _KINDS if members.match(character))
    name = unicodedata.name(character, "").lower()
    return f"({name}) {what}" if name else what


def _mixed(found: str) -> str:
    other = next(character for character in (found[-1], found[0]) if re.match(f"[{_FOREIGN}]", character))
    name = unicodedata.name(other, "a letter").lower()
    return f"letters of different alphabets in one word: U+{ord(other):04X} ({name}) beside a Latin letter"


def _twins(text: str) -> Iterator[Suspicion]:
    """Words of another alphabet made of nothing but letters that pass for Latin ones, on lines without any other."""
    offset = 0
    for line in text.split("\n"):
        if (
            not line.isascii()
            and (found := _TWINS.search(line)) is not None
            and _HAS_LATIN.search(line)
            and not _CLEARLY_OTHER.search(line)
        ):
            name = unicodedata.name(found[0][0], "a letter").lower()
            yield Suspicion(
                offset + found.start(), f"U+{ord(found[0][0]):04X} ({name}) passes for a Latin letter among Latin text"
            )
        offset += len(line) + 1


def _is_in_order(text: str, at: int) -> bool:
    """Whether a joiner, selector or tag stands where it belongs."""
    character = text[at]
    before = text[at - 1] if at else ""
    after = text[at + 1] if at + 1 < len(text) else ""
    if character in _JOINERS:
        if character == "\u200d" and _is_picture(before, text, at) and after and unicodedata.category(after) == "So":
            return True
        return _joins(before) and (_joins(after) or not (after.isalnum() or _SUSPICIOUS.match(after)))
    if character in "\ufe0e\ufe0f":
        return _is_picture(before, text, at) or (before in "#*0123456789" and before != "" and after == "\u20e3")
    if "\ufe00" <= character <= "\ufe02" or "\U000e0100" <= character <= "\U000e01ef":
        return before != "" and unicodedata.name(before, "").startswith("CJK")
    if character in "\u180b\u180c\u180d\u180f":
        return before != "" and unicodedata.name(before, "").startswith("MONGOLIAN")
    if "\U000e0020" <= character <= "\U000e007f":
        return _is_flag(text, at)
    return False


def _joins(character: str) -> bool:
    return character != "" and unicodedata.name(character, "").startswith(_JOINING)


def _is_picture(before: str, text: str, at: int) -> bool:
    """Whether what stands before may begin or continue an emoji: a picture, or its selector or skin colour."""
    if before == "\ufe0f" and text[at] == "\u200d":
        before = text[at - 2] if at >= 2 else ""
    return (
        before != ""
        and (unicodedata.category(before) in ("So", "Sk", "Sm") or before in "‼⁉〰〽")
        and ord(before) > 0xA8
    )


def _is_flag(text: str, at: int) -> bool:
    """Whether a tag belongs to the flag of a country's part: a black flag, up to six of them and an end."""
    start = at
    while start > 0 and at - start < 7 and "\U000e0020" <= text[start - 1] <= "\U000e007f":
        start -= 1
    if start == 0 or text[start - 1] != "\U0001f3f4":
        return False
    end = text.find("\U000e007f", start, start + 7)
    return end >= at and all("\U000e0030" <= one <= "\U000e007a" for one in text[start:end])
