"""What a guest's network did, for people: `logs --egress`, and the words at a session's end."""

from __future__ import annotations

import json as json_module
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vmsandbox.egress.values import EgressEvent, EgressKind
from vmsandbox.egress.wire import event_to_json, parse_untrusted_event
from vmsandbox.errors import VmsandboxError
from vmsandbox.paths import Layout
from vmsandbox.review.text import shown
from vmsandbox.session.network.egress_log import FILE, read_events
from vmsandbox.session.state.folder import SessionFolder

_LOOK = 0.2  # seconds between two looks at a file that grows
_NOTABLE = {EgressKind.REFUSED, EgressKind.ALERT, EgressKind.FAILED, EgressKind.LIMIT, EgressKind.LEARNED}


def show_egress(layout: Layout, name: str, record: Path, follow: bool, json: bool) -> int:
    """Print what a session's broker did, one line per event, as they come."""
    for event in _events(layout, name, record, follow):
        if json:
            print(json_module.dumps(json_module.loads(event_to_json(event)), sort_keys=True), flush=True)
        else:
            print(event_line(event), flush=True)
    return 0


def _events(layout: Layout, name: str, record: Path, follow: bool) -> Iterator[EgressEvent]:
    path, rest, at = record / FILE, b"", 0
    while True:
        # Looked at before the file: what the session wrote last is not missed.
        goes_on = follow and SessionFolder(layout, _live_name(record, name)).path.exists()
        piece = b""
        if path.exists():
            with path.open("rb") as file:
                file.seek(at)
                piece = file.read(1 << 20)
        at += len(piece)
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            try:
                yield parse_untrusted_event(line)
            except VmsandboxError as error:
                print(f"vmsandbox: a damaged line: {error.brief}", file=sys.stderr)
        if not piece:
            if not goes_on:
                return
            time.sleep(_LOOK)


def _live_name(record: Path, name: str) -> str:
    """The session's name: a record's id is "<date>-<time>-<name>-<six digits>"."""
    return record.name[16:-7] or name


def event_line(event: EgressEvent) -> str:
    """One event for people. All that a guest may have chosen is made harmless for a terminal."""
    when = datetime.fromtimestamp(event.time, UTC).isoformat(timespec="milliseconds")[:23] + "Z"
    target = f"{event.host}:{event.port}" if event.host else ""
    words = [event.method, target + event.path if event.path.startswith("/") else f"{target} {event.path}".strip()]
    if event.status:
        words.append(str(event.status))
    if event.kind is EgressKind.CLOSED:
        words.append(f"sent {event.sent}, received {event.received}, {event.seconds:.2f} s")
    if event.address:
        words.append(f"at {event.address}")
    words += [f"{key}={value}" for key, value in sorted(event.more.items())]
    if event.rule and event.kind is not EgressKind.CLOSED:
        words.append(f"[{event.rule}]")
    if event.kind in _NOTABLE:
        words += [event.reason, f"(to allow it: {event.remedy})" if event.remedy else ""]
    return f"{when}  {event.kind.value:<8}  " + shown(" ".join(word for word in words if word), 600)


def network_report(record: Path, mode: str, learn: bool) -> dict[str, Any]:
    """What a session's network did, for `--json`.

    learned: the policy that would allow what was let through by --learn alone, as YAML; None without --learn.
    """
    from vmsandbox.egress.learn import propose
    from vmsandbox.egress.summary import summarise

    return {
        "mode": mode,
        **summarise(read_events(record)).as_json(),
        "learned": propose(read_events(record)).text if learn else None,
    }


def tell_network(record: Path, learn: bool) -> None:
    """The same for people, on stderr."""
    from vmsandbox.egress.learn import propose
    from vmsandbox.egress.summary import summarise

    for line in summarise(read_events(record)).lines():
        print(f"vmsandbox: {line}", file=sys.stderr)
    if not learn:
        return
    proposal = propose(read_events(record))
    if not proposal.text:
        print("vmsandbox: nothing was learned: the policy allows all that was asked for", file=sys.stderr)
        return
    path = record / "learned.yaml"
    path.write_text(proposal.text)
    print(f"vmsandbox: learned: a policy that allows it, in {path}:", file=sys.stderr)
    print(proposal.text, end="", file=sys.stderr)
    if proposal.skipped or proposal.truncated:
        left = f"{proposal.skipped} requests are in no rule" + (", nor are further hosts" if proposal.truncated else "")
        print(f"vmsandbox: {left}", file=sys.stderr)
    print(
        f"vmsandbox: to apply it: see what it widens with `vmsandbox policy diff POLICY {path}`, "
        "then write what you agree with into the project's .claude/sandbox.yaml",
        file=sys.stderr,
    )
