"""Sends an archive into a guest, over the port that is there for many bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from vmsandbox.errors import GuestError
from vmsandbox.guest.bulk import TICK
from vmsandbox.guest.pack import RECORD
from vmsandbox.render.domain import BULK_CHANNEL
from vmsandbox.session.live.running import RunningSandbox

Write = Callable[[bytes], None]
Result = TypeVar("Result")

_PIECE = 1 << 20
_PATIENCE = 600  # seconds after the last byte
_MAX_ANSWER = 256 << 20
# Opened once for all archives that follow each other: what has arrived and was not read is lost when a port is closed.
PORT = f"/dev/virtio-ports/{BULK_CHANNEL}"
UNTAR = f"tar -x -p --no-same-owner -b {RECORD // 512} -B -f -"


def send_archive(sandbox: RunningSandbox, command: list[str], fill: Callable[[Write], Result]) -> tuple[bytes, Result]:
    """Run a command that reads an archive from the bulk port (`UNTAR` from `PORT`), and fill that archive.

    Returns:
        The command's untrusted output, and what `fill` returned.

    Raises:
        GuestError: the command ended badly, or stopped reading.
    """
    shell = sandbox.shell()
    with sandbox.folder.bulk_port() as port:
        channel = shell.start(command, plumbing=True)
        try:
            channel.shutdown_write()
            ended = channel.status_event.is_set
            result = fill(lambda data: port.write(data, ended))
            untrusted = _all_of(channel, port.nudge)
            _expect_success(channel)
            return untrusted, result
        except (GuestError, OSError) as error:
            raise GuestError("the guest did not take it", details=f"{error}\n{last_words(channel)}") from error
        finally:
            channel.close()


def _all_of(channel: Any, nudge: Callable[[], None]) -> bytes:
    untrusted = bytearray()
    channel.settimeout(TICK)
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            piece = channel.recv(_PIECE)
        except TimeoutError:
            if time.monotonic() > until:
                raise GuestError(f"the guest's side did not end within {_PATIENCE} seconds") from None
            nudge()
            continue
        if not piece:
            return bytes(untrusted)
        untrusted += piece
        if len(untrusted) > _MAX_ANSWER:
            raise GuestError("the guest's answer does not end")


def _expect_success(channel: Any) -> None:
    from vmsandbox.guest.ssh import exit_status

    status = exit_status(channel, 60)
    if status != 0:
        raise GuestError(f"the guest's side failed with status {status}")


def last_words(channel: Any) -> str:
    """The end of a guest program's stderr, safe to show."""
    from vmsandbox.review.text import shown_bytes

    untrusted = channel.recv_stderr(4000) if channel.recv_stderr_ready() else b""
    return shown_bytes(untrusted, 2000)
