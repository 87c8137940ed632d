"""The process that keeps the network of a guest which outlives its command: started here, and ended.

`vmsandbox start` returns, and somebody must hold the SSH connection that leads to the broker. The keeper does, until
its guest is gone or `stop` ends it. It gets everything through a pipe (secrets are in no file and no argument) and
does nothing before its session has an identity: if the command that started it dies first, it ends.
"""

from __future__ import annotations

import os
import select
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from vmsandbox.errors import GuestError
from vmsandbox.process import Programs
from vmsandbox.session.state.background import END_SECONDS, background_is_alive, end_background, start_background
from vmsandbox.session.state.folder import SessionFolder

if TYPE_CHECKING:
    from vmsandbox.session.network.egress import EgressPlan

KIND = "keeper"
GO, FORWARDS = b"go\n", b"forwards\n"


@dataclass
class Keeper:
    """A keeper that was just started, seen from the command that started it."""

    folder: SessionFolder
    pid: int
    to: IO[bytes]
    said: IO[bytes]

    def go(self) -> None:
        """Tell it that the guest takes logins now."""
        with suppress(OSError):
            self.to.write(GO)
            self.to.close()

    def wait_until_it_forwards(self, seconds: float) -> None:
        """Raises GuestError if the guest does not reach its broker within `seconds`."""
        until = time.monotonic() + seconds
        untrusted = b""
        while not untrusted.endswith(b"\n"):
            ready, _, _ = select.select([self.said], [], [], max(until - time.monotonic(), 0))
            piece = os.read(self.said.fileno(), 100) if ready else b""
            if not piece:
                break
            untrusted += piece
        self.said.close()
        if untrusted != FORWARDS:
            raise GuestError(
                "the guest's network did not come up",
                details=log_tail(self.folder) or f"nothing within {seconds:g} seconds",
                resolution="`vmsandbox doctor` says whether the broker's environment is there",
            )


def start_keeper(folder: SessionFolder, plan: EgressPlan, environment: Path, programs: Programs) -> Keeper:
    """Start the keeper of a session whose folder is claimed; the broker starts at once, the login waits for `go`.

    Raises:
        HostError: it cannot be started.
    """
    from vmsandbox.egress.wire import config_to_json

    told = {
        "mode": plan.mode.value,
        "config": config_to_json(plan.config).decode(),
        "environment": str(environment),
    }
    return Keeper(folder, *start_background(folder, KIND, "network.egress_keeper", told, programs))


def log_tail(folder: SessionFolder) -> str:
    """The end of what a keeper had to say."""
    with suppress(OSError):
        return folder.keeper_log.read_bytes()[-2000:].decode("utf-8", "replace").strip()
    return ""


def keeper_is_alive(folder: SessionFolder) -> bool | None:
    """Whether the session's keeper runs; None if it has none."""
    return background_is_alive(folder, KIND)


def end_keeper(folder: SessionFolder) -> None:
    """End a session's keeper, and wait for it: it writes the totals down. None, or one that is gone, is no error.

    Raises:
        HostError: it does not end.
    """
    end_background(folder, KIND, END_SECONDS)
