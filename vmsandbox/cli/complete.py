"""Shell completion of names."""

from __future__ import annotations

import typer

from vmsandbox.errors import VmsandboxError
from vmsandbox.paths import Layout
from vmsandbox.session.state.folder import SessionFolder, live_sessions


def session_names(incomplete: str) -> list[str]:
    """Names of live sessions that begin with what was typed."""
    try:
        return [
            folder.name for folder in live_sessions(Layout.from_environment()) if folder.name.startswith(incomplete)
        ]
    except (VmsandboxError, OSError):
        return []


def snapshot_tags(context: typer.Context, incomplete: str) -> list[str]:
    """Tags of the named session's snapshots."""
    from vmsandbox.session.rewind.snapshots import snapshots

    try:
        folder = SessionFolder(Layout.from_environment(), str(context.params.get("name")))
        return [row.tag for row in snapshots(folder) if row.tag.startswith(incomplete)]
    except (VmsandboxError, OSError):
        return []
