"""The process that reads every byte which a guest sends back, with nothing to lose.

Without it, the program that holds the person's rights would parse a hostile stream. Started by `receive.start`, it
gives all its rights up first (`receive.confine`), then lets `receive.receiver` read; its parent checks what it says
again. It never fails with a traceback: what is wrong becomes one FAILED frame.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import BinaryIO, NoReturn

from vmsandbox.receive.confine import confine
from vmsandbox.receive.listing import read_baseline
from vmsandbox.receive.protocol import CHANGED, DONE, FAILED, GONE, ProtocolError, ReturnLimits, frame
from vmsandbox.receive.receiver import Blobs, HostFailed, Receiver
from vmsandbox.review.manifest import Item, Manifest, ManifestLimits, parse_untrusted_manifest


def receive(asked: dict[str, object]) -> None:
    """Confine this process and read one return (see `main`)."""
    limits = ReturnLimits(**asked["limits"])  # type: ignore[arg-type]
    folder, pushed_fd, baseline_fd = (int(asked[name]) for name in ("folder", "pushed", "baseline"))  # type: ignore[call-overload]
    user = asked["user"]
    assert user is None or isinstance(user, int)
    force = confine(folder, user, limits.file_bytes)
    gc.disable()  # nothing here is a cycle, and millions of values would be looked through
    parent = open(1, "wb", closefd=False)  # noqa: SIM115 - a descriptor
    with open(pushed_fd, "rb") as stream:  # noqa: PTH123
        many = ManifestLimits(entries=limits.entries * 2)
        pushed = dict(parse_untrusted_manifest(iter(lambda: stream.read(1 << 20), b""), many).items)
    baseline: dict[bytes, str] = {}
    if baseline_fd >= 0:
        with open(baseline_fd, "rb") as stream:  # noqa: PTH123
            baseline = read_baseline(stream, pushed, limits)
    blobs = Blobs(folder, limits)
    guest = open(0, "rb", buffering=1 << 20, closefd=False)  # noqa: SIM115
    receiver = Receiver(guest, parent, blobs, pushed, baseline, limits)
    receiver.run()
    _tell_difference(parent, pushed, receiver.items)
    done = {"bytes": blobs.total, "held": receiver.held, "confined": force}
    parent.write(frame(DONE, json.dumps(done).encode("ascii")))
    parent.flush()


def _tell_difference(parent: BinaryIO, pushed: dict[str, Item], items: dict[str, Item]) -> None:
    """Tell the parent what is not as it was pushed (with the folders it is in), and what is gone."""
    told: dict[str, Item] = {}
    for path, item in items.items():
        if pushed.get(path) != item:
            while path and path not in told and path in items:
                told[path] = items[path]
                path = path.rpartition("/")[0]
    lines: list[bytes] = []
    size = 0
    for line in Manifest(told).lines():
        lines.append(line)
        size += len(line)
        if size > 1 << 18:
            parent.write(frame(CHANGED, b"".join(lines)))
            lines, size = [], 0
    parent.write(frame(CHANGED, b"".join(lines)))
    gone = [os.fsencode(path) for path in pushed if path not in items]
    for start in range(0, len(gone), 1000):
        parent.write(frame(GONE, b"\0".join(gone[start : start + 1000])))


def main(asked: str) -> NoReturn:
    """The process. `asked`: JSON with the descriptors folder, pushed, baseline (-1: none), user, and limits."""
    try:
        receive(json.loads(asked))
        status = 0
    except BaseException as error:
        status = 1
        _fail(error)
    os._exit(status)  # no clean-up of an interpreter that may be full of a guest's values


def _fail(error: BaseException) -> None:
    if isinstance(error, ProtocolError):
        told = {"fault": "guest", "brief": error.brief, "details": error.details[:2000]}
    elif isinstance(error, MemoryError):
        told = {"fault": "guest", "brief": "what came back needs more memory than is allowed", "details": ""}
    elif isinstance(error, HostFailed):
        told = {"fault": "host", "brief": str(error), "details": ""}
    else:
        told = {"fault": "host", "brief": "the receiver failed", "details": f"{type(error).__name__}: {error}"[:2000]}
    try:
        sys.stdout.buffer.write(frame(FAILED, json.dumps(told).encode("ascii")))
        sys.stdout.buffer.flush()
    except OSError:
        pass
