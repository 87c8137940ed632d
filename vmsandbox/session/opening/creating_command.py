"""The policy's own command in the guest that becomes a template: run, watched, and explained where it fails.

Without the explanation, `pip install` in a guest without a network would be forty lines of retries.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from vmsandbox.egress.values import EgressKind
from vmsandbox.egress.wire import WireError, parse_untrusted_event
from vmsandbox.errors import GuestError, VmsandboxError
from vmsandbox.guest.streams import Sink, join_streams
from vmsandbox.monitor import Monitor
from vmsandbox.policy.fetchers import bundles_for, shown_command
from vmsandbox.review.text import shown
from vmsandbox.session.live.running import RunningSandbox
from vmsandbox.session.network.egress_log import FILE

SECONDS = 1800.0  # that it may take
LAST_WORDS = 1.0  # seconds after its end
_TAIL, _LINES = 4000, 30  # bytes of what it said, and lines that are shown
_LISTING = 64 << 10  # of the names in the project's folder
_MOST = 8  # refused hosts that are named


class _Deadline:
    """`guest.streams.Attention` that shows that a command goes on, and ends one that takes too long.

    It has ended when its process has: what it left in the background may hold its output open for ever.
    """

    def __init__(self, monitor: Monitor, channel: Any) -> None:
        self.reading = threading.Lock()
        self._monitor, self._channel, self._began = monitor, channel, time.monotonic()
        self._ended: float | None = None

    def sources(self) -> list[Any]:
        return []

    def attend(self) -> bool:
        now = time.monotonic()
        if self._channel.exit_status_ready():
            self._ended = self._ended or now
            if now - self._ended > LAST_WORDS:
                self._channel.close()
            return False
        taken = now - self._began
        if taken > SECONDS:
            raise GuestError(
                f"session.post_create did not end in {SECONDS:g} seconds",
                resolution="what takes so long belongs in an image: `vmsandbox image build`",
            )
        self._monitor.progress(0.2 + 0.4 * taken / SECONDS, 1, f"it runs for {taken:.0f} s")
        return False


def run_command(sandbox: RunningSandbox, command: Sequence[str], has_network: bool) -> None:
    """Run it as the worker, in the project's folder if there is one.

    Raises:
        GuestError: it failed, or took too long; with the end of what it said, what it was refused, and advice.
    """
    untrusted = bytearray()

    def keep(data: bytes) -> None:
        untrusted.extend(data)
        del untrusted[:-_TAIL]

    before = _names(sandbox)
    began = time.monotonic()
    status = _to_its_end(sandbox, sandbox.start(command), keep)
    sandbox.ended(status, time.monotonic() - began)
    if status != 0:
        raise _failure(sandbox, command, status, bytes(untrusted), has_network)
    if left := sorted(_names(sandbox) - before):
        names = ", ".join(shown(name, 60) for name in left[:_MOST])
        sandbox.monitor.warning(
            f"session.post_create wrote into the project, where nothing stays: {names} (the rest of the home does)"
        )


def _names(sandbox: RunningSandbox) -> set[str]:
    """What lies in the project's folder in the guest; untrusted, for a person alone."""
    if sandbox.info.guest_folder is None:
        return set()
    untrusted = bytearray()

    def keep(data: bytes) -> None:
        untrusted.extend(data[: _LISTING - len(untrusted)])

    _to_its_end(sandbox, sandbox.shell().start(["ls", "-A", "--", sandbox.info.guest_folder]), keep)
    return set(untrusted.decode("utf-8", "replace").splitlines())


def _to_its_end(sandbox: RunningSandbox, started: Any, keep: Sink) -> int:
    with closing(started) as channel:
        return join_streams(channel, None, keep, keep, attention=_Deadline(sandbox.monitor, channel))


def _failure(
    sandbox: RunningSandbox, command: Sequence[str], status: int, untrusted: bytes, has_network: bool
) -> VmsandboxError:
    if sandbox.network_to_come is not None:
        sandbox.network_to_come.close()  # its log is whole then
    refused = refused_hosts(sandbox.folder.record_folder(sandbox.info.id) / FILE)
    lines = untrusted.decode("utf-8", "replace").splitlines()[-_LINES:]
    details = "\n".join(shown(line, 300) for line in lines) or "(it said nothing)"
    if refused:
        details += "\n--- refused by the policy's network ---\n" + "\n".join(refused)
    return GuestError(
        f"session.post_create failed with status {status}: {shown(shown_command(command), 120)}",
        details=details,
        resolution="\n".join(advice(command, sandbox.name if refused else None, has_network)),
    )


def advice(command: Sequence[str], refused_in: str | None, has_network: bool) -> list[str]:
    """What a person can do about it, a line each. refused_in: the session in which hosts were refused."""
    hosts = ", ".join(f'"{one}"' for one in bundles_for(command)) or "HOST"
    lines = []
    if not has_network:
        lines.append(
            "it had no network; if it fetches something, allow that: "
            f"network: {{mode: restricted, allowed_hosts: [{hosts}]}}"
        )
    elif refused_in is not None:
        rest = f"`vmsandbox logs {refused_in} --egress` has the rest"
        lines.append(f"allow what it needs: network.allowed_hosts: [{hosts}]; {rest}")
    lines.append(
        "it saw only what it names of the project, and lists of packages: session.post_create_files names more of it"
    )
    return lines


def refused_hosts(egress: Path) -> list[str]:
    """Which hosts were refused, and why, each once."""
    found: dict[str, None] = {}
    with suppress(OSError), egress.open("rb") as file:
        for line in file:
            try:
                event = parse_untrusted_event(line)
            except WireError:
                continue
            if event.kind in (EgressKind.REFUSED, EgressKind.FAILED):
                found[f"{shown(event.host, 100)}:{event.port}: {shown(event.reason, 200)}"] = None
    return [*list(found)[:_MOST], *(["…"] if len(found) > _MOST else [])]
