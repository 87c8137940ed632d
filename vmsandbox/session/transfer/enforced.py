"""Holds a guest to its policy: guards the project after it was copied in, and reads back what is in force.

Nothing of the person's runs before both are done. What is in the template's power is there already
(`render.confinement`); here is what depends on the project, and the proof.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from vmsandbox.errors import GuestError, RefusedError
from vmsandbox.guest.control import ControlPort
from vmsandbox.journal import events
from vmsandbox.policy.values import Policy
from vmsandbox.render.confinement import asks_of_guest
from vmsandbox.render.guest_paths import guest_paths
from vmsandbox.render.readback import (
    Expected,
    count,
    differences,
    expected_of,
    expected_of_project,
    is_whole,
    parse_facts,
    script_of,
)
from vmsandbox.session.live.running import RunningSandbox

GUARD_DEADLINE = 20.0  # seconds
READ_DEADLINE = 30.0
_MOST = 1 << 20  # bytes of facts


@contextmanager
def enforced(sandbox: RunningSandbox, policy: Policy, project: Path | None, folder: str | None) -> Iterator[None]:
    """Around a push: the project is open within, guarded and read back afterwards.

    Args:
        project: the folder on the host; None: there is none.
        folder: where it comes to lie in the guest.

    Raises:
        RefusedError: the guest is not confined as the policy says.
        GuestError: the guest did not answer.
    """
    if not asks(policy):
        yield
        return
    denied = denied_names(policy, project) if project else ()
    began = time.monotonic()
    if not sandbox.project_is_open:
        _tell(sandbox, {"state": "open"})
        sandbox.project_is_open = True
    reading = _Reading(sandbox, policy, expected_of_project(policy, folder, denied) if folder else None)
    try:
        try:
            yield
        finally:
            # Also after a push that failed: what lies there is not left open.
            _tell(sandbox, guard_request(policy, folder, denied))
            sandbox.project_is_open = False
        reading.check(began)
    finally:
        reading.close()


def asks(policy: Policy) -> bool:
    """Whether a guest differs under this policy from one under none."""
    return asks_of_guest(policy) or guest_paths(policy.filesystem).guards_project


def guard_request(policy: Policy, folder: str | None, denied: tuple[str, ...]) -> dict[str, Any]:
    """The fields of operation `project` (cloudinit/guest/vmsandbox_mounts.py)."""
    paths = guest_paths(policy.filesystem)
    writable = paths.project_writable
    if folder is None:
        # Nothing is there yet that could be guarded; where the worker may write little, this is not of it.
        return {"state": "guarded", "path": None, "writable": None if paths.writable is None else []}
    return {
        "state": "guarded",
        "path": folder,
        "writable": None if writable is None else list(writable),
        "denied": list(denied),
    }


def denied_names(policy: Policy, project: Path) -> tuple[str, ...]:
    """What of the project is denied, relative to it: as written, and what that leads to through links."""
    root = os.path.realpath(project)
    names = set()
    for name in guest_paths(policy.filesystem).project_hidden:
        names.add(name)
        led_to = os.path.relpath(os.path.realpath(f"{root}/{name}"), root)
        if led_to != "." and not led_to.startswith(".."):
            names.add(led_to)
    # A folder covers what is below it, and what lies behind a link of the project's is covered where it really is.
    return tuple(
        sorted(name for name in names if not any(name.startswith(other + "/") for other in names)
               and not _through_link(root, name))
    )  # fmt: skip


def _through_link(root: str, name: str) -> bool:
    parts = name.split("/")
    return any(Path(root, *parts[:depth]).is_symlink() for depth in range(1, len(parts)))


def _tell(sandbox: RunningSandbox, request: dict[str, Any]) -> None:
    with closing(ControlPort(sandbox.folder.run / "control")) as control:
        try:
            control.request("project", deadline=GUARD_DEADLINE, **request)
        except GuestError as error:
            raise RefusedError(
                "the guest could not guard the project as the policy says",
                details=f"{error.brief}: {error.details}",
                resolution="a path under filesystem.allowed_paths or denied_paths that is a link in the project "
                "cannot be guarded: name what it leads to",
            ) from error


class _Reading:
    """The worker's shell that tells what is in force. Started before the push, so that it costs no time of its own."""

    def __init__(self, sandbox: RunningSandbox, policy: Policy, project: Expected | None) -> None:
        self._sandbox = sandbox
        self._expected, self._project = expected_of(policy), project
        self._channel = sandbox.shell().evaluate(script_of(self._expected, project))

    def close(self) -> None:
        self._channel.close()

    def check(self, began: float) -> None:
        """Compare, and write down that it holds. Raises RefusedError or GuestError."""
        untrusted = self._read()
        try:
            facts = parse_facts(untrusted)
        except GuestError as error:
            raise RefusedError(
                "the guest's shell does not run under this policy, so nothing else would",
                details=f"{error.details}\n{self._last_words()}".strip(),
                resolution="`vmsandbox policy check` names what kernel.seccomp or commands lack for a shell",
            ) from error
        found = differences(self._expected, facts)
        checks = count(self._expected)
        if self._project is not None:
            found += differences(self._project, facts, "project")
            checks += count(self._project)
        if found:
            raise RefusedError(
                "the guest is not confined as the policy says",
                details="\n".join(found),
                resolution="stop this guest; `vmsandbox gc --templates` removes its template, then a new one is made",
            )
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        seconds = round(time.monotonic() - began, 3)
        self._sandbox.journal.append(events.PolicyEnforced(digest, checks, seconds))

    def _read(self) -> bytes:
        channel, untrusted = self._channel, bytearray()
        until = time.monotonic() + READ_DEADLINE
        try:
            channel.sendall(b"go\n")
            channel.settimeout(READ_DEADLINE)
            while not is_whole(untrusted) and time.monotonic() < until and len(untrusted) < _MOST:
                piece = channel.recv(1 << 16)
                if not piece:
                    break
                untrusted += piece
        except (OSError, EOFError):
            pass  # what it said until then is judged
        return bytes(untrusted)

    def _last_words(self) -> str:
        from vmsandbox.session.transfer.archive import last_words

        return last_words(self._channel)
