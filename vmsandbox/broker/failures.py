"""What a failure of the broker itself says: where it was, and never what it was about.

An exception's message may quote a header, and headers hold secrets; these words end up in a session's records.
"""

from __future__ import annotations

import os
import traceback
from contextlib import suppress


def say(words: str) -> None:
    """Last words for the parent."""
    with suppress(OSError):
        os.write(2, words.encode("utf-8", "replace") + b"\n")


def say_failure(where: str, error: BaseException | None) -> None:
    """The kind of an exception and the lines that it came through."""
    lines = [f"{where}: {type(error).__name__}"]
    if error is not None:
        frames = traceback.extract_tb(error.__traceback__)[-8:]
        lines += [f"  {frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
    say("\n".join(lines))
