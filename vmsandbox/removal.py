"""How a folder is removed that others look for: first its name, then what is in it."""

from __future__ import annotations

import secrets
from pathlib import Path

GONE = ".gone-"  # how the name of a folder begins that is being removed; `gc` removes what was interrupted


def put_aside(folder: Path) -> Path:
    """Take a folder's name away, so that nobody finds half of it; returns where it is now. Raises OSError."""
    gone = folder.with_name(f"{GONE}{folder.name}.{secrets.token_hex(4)}")
    folder.rename(gone)
    return gone
