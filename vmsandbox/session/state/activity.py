"""That something is done in a session, for those who watch over it: the time of one file.

Without it a guest that somebody works in from another terminal would end as idle.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from vmsandbox.session.state.folder import SessionFolder


def activity_file(folder: SessionFolder) -> Path:
    """The file whose time of change says when something was last done in the session. Not there: nobody asks."""
    return folder.path / "activity"


def note_activity(folder: SessionFolder) -> None:
    """Something was done in the session."""
    with suppress(OSError):
        os.utime(activity_file(folder))
