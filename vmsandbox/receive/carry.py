"""Carries bytes between a guest and the receiver, and watches time and rate from outside.

Nothing of the guest's bytes is looked at here. What the receiver says is read as strictly as if the guest had said it.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from vmsandbox.errors import GuestError, HostError
from vmsandbox.process import Piped
from vmsandbox.receive.protocol import (
    CHANGED,
    DONE,
    ENOUGH,
    FAILED,
    GONE,
    PROGRESS,
    REQUEST,
    ProtocolError,
    ReturnLimits,
    read_frame,
)
from vmsandbox.review.text import shown

_PIECE = 256 << 10
_BUFFER = 1 << 20
_FRAME = 64 << 20  # of the receiver's last words
_FROM_RECEIVER = REQUEST + ENOUGH + PROGRESS + CHANGED + GONE + DONE + FAILED
HOSTILE = "the guest is not to be trusted: nothing of it was taken; stop the session"


class Wire(Protocol):
    """The connection to the guest's sender; an SSH channel is one. `close` must wake who waits in `recv`."""

    def recv(self, nbytes: int) -> bytes:
        """Some bytes; none at the end."""

    def sendall(self, data: bytes) -> object:
        """Send all of it."""

    def shutdown_write(self) -> None:
        """Nothing more will be sent."""

    def close(self) -> None:
        """End it in both directions."""


@dataclass
class Carrying:
    """The two streams of a return under way."""

    wire: Wire
    child: Piped
    moved: int = 0
    promised: int = 0
    changed: bytearray = field(default_factory=bytearray)
    gone: set[str] = field(default_factory=set)
    outcome: dict[str, Any] = field(default_factory=dict)
    ended: threading.Event = field(default_factory=threading.Event)

    def feed(self) -> None:
        """Guest → receiver, until either ends."""
        with suppress(OSError, EOFError):
            while untrusted := self.wire.recv(_PIECE):
                self.moved += len(untrusted)
                view = memoryview(untrusted)
                while view:
                    view = view[os.write(self.child.stdin.fileno(), view) :]
        with suppress(OSError):
            self.child.stdin.close()

    def answer(self, changed_bytes: int) -> None:
        """Receiver → guest, until the receiver is done."""
        try:
            stream = os.fdopen(os.dup(self.child.stdout.fileno()), "rb", buffering=_BUFFER)
            with stream:
                while not self.outcome:
                    kind, data = read_frame(stream, _FROM_RECEIVER, _FRAME)
                    self._frame(kind, data)
                    if len(self.changed) > changed_bytes or len(self.gone) > changed_bytes:
                        raise ProtocolError("the manifest is too long")
        except (ProtocolError, OSError, EOFError, ValueError, KeyError, TypeError) as error:
            if not self.outcome:
                self.outcome = {"fault": "receiver", "brief": str(error), "details": ""}
        finally:
            self.ended.set()

    def _frame(self, kind: bytes, data: bytes) -> None:
        if kind == REQUEST:
            with suppress(OSError, EOFError):  # the guest is gone: the receiver will hear of it
                self.wire.sendall(data)
        elif kind == ENOUGH:
            with suppress(OSError, EOFError):
                self.wire.shutdown_write()
        elif kind == PROGRESS:
            self.promised = int(data[:40].split()[1])
        elif kind == CHANGED:
            self.changed += data
        elif kind == GONE:
            self.gone.update(os.fsdecode(path) for path in data.split(b"\0"))
        else:
            self.outcome = _outcome(kind, data)


def _outcome(kind: bytes, data: bytes) -> dict[str, Any]:
    told = json.loads(data)
    if kind == FAILED:
        return {name: str(told[name]) for name in ("fault", "brief", "details")}
    held, confined = told["held"], told["confined"]
    if not all(isinstance(word, str) for word in (*held, *confined)):
        raise ValueError("not texts")
    return {"held": held, "confined": confined}


def watch(carrying: Carrying, limits: ReturnLimits, on_progress: Callable[[int, int], None] | None) -> None:
    """Wait for the receiver's end. Raises GuestError if the guest is too slow."""
    began = window = time.monotonic()
    moved = 0
    while not carrying.ended.wait(0.2):
        if on_progress is not None:
            on_progress(carrying.moved, carrying.promised)
        now = time.monotonic()
        if now - began > limits.seconds:
            raise GuestError(f"the return did not end in {limits.seconds:g} seconds", resolution=HOSTILE)
        if now - window > limits.stall_seconds:
            if carrying.moved - moved < limits.stall_bytes:
                raise GuestError(
                    "the guest sends too slowly",
                    details=f"{carrying.moved - moved} bytes in {limits.stall_seconds:g} seconds",
                    resolution="try again; if it stays so, stop the session",
                )
            window, moved = now, carrying.moved


def failure(carrying: Carrying) -> GuestError | HostError:
    """The error that the receiver's outcome stands for, safe to show."""
    told = carrying.outcome
    brief, details = shown(told["brief"], 300), shown(told["details"], 1000)
    if told["fault"] == "guest":
        return GuestError(f"what the guest sent back is refused: {brief}", details=details, resolution=HOSTILE)
    if told["fault"] == "host":
        return HostError(brief, details=details, resolution="`vmsandbox gc` gives space back")
    with suppress(HostError):
        details = f"status {carrying.child.wait(5)}"
        os.set_blocking(carrying.child.stderr.fileno(), False)
        last_words = (carrying.child.stderr.read(4000) or b"").decode("utf-8", "replace")
        details += f": {shown(last_words, 2000)}" if last_words else ""
    return GuestError(f"the receiver ended: {brief}", details=details, resolution=HOSTILE)
