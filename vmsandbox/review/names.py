"""Names that are not what they seem, or are not the same everywhere.

Without it a file called `-rf`, one whose name hides a newline, or `Readme` beside `README` would come back unremarked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

from vmsandbox.review.manifest import Item, Manifest
from vmsandbox.review.risky import is_git_folder
from vmsandbox.review.text import shown
from vmsandbox.review.unicode import suspicions
from vmsandbox.review.values import Finding, Risk

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
# Microsoft, "Naming Files, Paths, and Namespaces".
_RESERVED = re.compile(
    r"(?:con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$)(?:\..*)?", re.IGNORECASE | re.DOTALL
)
_NOT_ON_WINDOWS = re.compile('[<>:"|?*]')
_SHOWN = 120


def name_findings(path: str) -> list[Finding]:
    """What is odd about the last component of a new path."""
    name = path.rpartition("/")[2]
    if is_git_folder(name):
        text = "some file systems take this name for git's own folder"
        return [Finding(Risk.NAME, f"{text}: {shown(name, _SHOWN)}", blocks=True)]
    why: list[str] = []
    if any("\udc80" <= character <= "\udcff" for character in name):
        why.append("is not UTF-8 text")
    if _CONTROL.search(name):
        why.append("has control characters")
    if "\\" in name:
        why.append("has a backslash, which parts folders on Windows")
    if name.startswith("-"):
        why.append("begins with -, so programs take it for an option")
    if name.startswith("~"):
        why.append("begins with ~, which shells take for a home")
    if name != name.strip():
        why.append("begins or ends with a space")
    if name.endswith("."):
        why.append("ends with a dot, which Windows drops")
    if _RESERVED.fullmatch(name):
        why.append("names a device on Windows")
    if _NOT_ON_WINDOWS.search(name):
        why.append("cannot be on Windows")
    found = [Finding(Risk.NAME, f"the name {one}: {shown(name, _SHOWN)}") for one in why]
    if not name.isascii():
        seen = {one.text: None for one in suspicions(name.encode("utf-8", "replace").decode())}
        found += [Finding(Risk.UNICODE, f"in the name: {text}") for text in list(seen)[:3]]
    return found


def collision_findings(
    pushed: Mapping[str, Item], returned: Mapping[str, Item], changed: Iterable[str]
) -> dict[str, Finding]:
    """A finding for each changed path that another path of either tree is one with, where case or Unicode forms do not
    count.

    The old tree counts too: `README` deleted and `readme` added are one file there.
    """
    wanted = set(changed)
    found: dict[str, Finding] = {}
    for group in Manifest({**pushed, **returned}).collisions():
        for path in group:
            if path in wanted and path in returned:
                others = ", ".join(shown(one, _SHOWN) for one in group if one != path)
                text = f"one and the same where upper and lower case or Unicode forms do not count: {others[:400]}"
                found[path] = Finding(Risk.NAME, text)
    return found


def sort_key(path: str) -> bytes:
    """The order of paths everywhere in a review: by their bytes."""
    return os.fsencode(path)
