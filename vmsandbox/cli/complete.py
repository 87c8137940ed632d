"""Shell completion of names."""

from __future__ import annotations

from vmsandbox.errors import VmsandboxError
from vmsandbox.paths import Layout
from vmsandbox.session.folder import live_sessions


def session_names(incomplete: str) -> list[str]:
    """Names of live sessions that begin with what was typed."""
    try:
        return [
            folder.name for folder in live_sessions(Layout.from_environment()) if folder.name.startswith(incomplete)
        ]
    except (VmsandboxError, OSError):
        return []
