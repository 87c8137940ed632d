"""What stays of a session, and what can still be done with it when its guest is gone.

The guest's work lies in the record's quarantine until it is collected anew; a person may look at it and accept it
long after the session. Everything here works from the record's folder alone.

    records/<id>/events.jsonl   the journal
    records/<id>/egress.jsonl   what its broker did (vmsandbox.session.network.egress_log)
    records/<id>/pushed.jsonl   manifest of what was copied in
    records/<id>/withheld.json  what stayed on the host, and why
    records/<id>/findings.json  what was found in what was copied in, or was not because of it
    records/<id>/returns-*.json what its policies let come back (the journal says which is in force)
    records/<id>/base.jsonl     the same, with what was accepted since
    records/<id>/quarantine/    what came back (vmsandbox.receive.store); its base.jsonl: what it is compared with
    records/<id>/accepted.jsonl what was accepted, and by whom
    records/<id>/backup/        the project of before (vmsandbox.session.records.backup)
    records/<id>/history.json   what the guest's repository started from
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vmsandbox.errors import HostError, UserInputError, VmsandboxError
from vmsandbox.hypervisor.launch import disk_errors
from vmsandbox.journal import events
from vmsandbox.journal.chain import Journal, verified_records
from vmsandbox.ledger.book import Ledger
from vmsandbox.paths import LEDGER, Layout
from vmsandbox.policy.merging.return_rules import narrowed
from vmsandbox.policy.values import ReturnPolicy
from vmsandbox.receive.store import Quarantine
from vmsandbox.removal import put_aside
from vmsandbox.review.changes import compare
from vmsandbox.review.manifest import Manifest, ManifestLimits, parse_untrusted_manifest
from vmsandbox.review.text import shown
from vmsandbox.session.asked.request import SessionRequest
from vmsandbox.session.state.folder import SessionFolder
from vmsandbox.spec import Grade

_LIMITS = ManifestLimits(bytes=1 << 30, entries=1_000_000)  # our own files
_OF_RETURN = "quarantine/base.jsonl"


@dataclass(frozen=True)
class Record:
    """The record folder of one session, live or ended."""

    folder: Path

    @property
    def id(self) -> str:
        """The session's id."""
        return self.folder.name

    @property
    def ledger(self) -> Ledger:
        """The ledger of the record's installation."""
        return Ledger.at(self.folder.parent.parent / LEDGER)

    @property
    def journal(self) -> Journal:
        """The session's journal."""
        return Journal(self.folder / "events.jsonl")

    def events(self) -> list[dict[str, Any]]:
        """All events, checked against their chain. Raises JournalError."""
        path = self.folder / "events.jsonl"
        return list(verified_records(path)) if path.exists() else []

    @property
    def project(self) -> Path:
        """The folder on the host that was pushed last. Raises UserInputError if nothing was."""
        for event in reversed(self.events()):
            if event["kind"] in ("project.pushed", "session.forked") and event["data"].get("project"):
                return Path(event["data"]["project"])
        raise UserInputError(
            f"nothing was copied into session {self.id}",
            resolution="`vmsandbox push NAME PATH` copies a project into a running session",
        )

    def request(self) -> SessionRequest:
        """What kind of guest the session had, to start another like it; emulated only if that one was."""
        request = SessionRequest()
        for event in self.events():
            data = event["data"]
            if event["kind"] == "guest.forked":
                request = replace(request, image=data["image"], vcpus=data["vcpus"], memory_mib=data["memory_mib"])
            elif event["kind"] == "guest.isolation":
                request = replace(request, allow_emulation=data["grade"] == Grade.EMULATED)
        return request

    def returns(self) -> ReturnPolicy:
        """What the session's policies let come back, as they were when it began and at each push.

        Never read from the project's own file: what the guest made of that may have been accepted since.

        Raises:
            HostError: the rules are not there as the journal says.
        """
        digest = next((one["data"]["digest"] for one in reversed(self.events()) if one["kind"] == "return.rules"), None)
        if digest is None:
            return ReturnPolicy()
        try:
            content = self._returns_file(digest).read_bytes()
            if hashlib.sha256(content).hexdigest() != digest:
                raise ValueError("it is not what the journal has the digest of")
            rules = json.loads(content)
            return ReturnPolicy(**{**rules, "denied_paths": tuple(rules["denied_paths"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise HostError(
                f"what may come back of session {self.id} is not known: its record is damaged", details=str(error)
            ) from error

    def keep_returns(self, rules: ReturnPolicy) -> None:
        """Hold the session to these rules too. The journal has their digest: it cuts long lists itself."""
        if rules == ReturnPolicy():
            return
        known = self.returns()
        both = narrowed(known, rules)
        if both == known:
            return
        content = json.dumps(asdict(both), sort_keys=True).encode()
        digest = hashlib.sha256(content).hexdigest()
        self._returns_file(digest).write_bytes(content)
        self.journal.append(events.ReturnRulesKept(both.accept, len(both.denied_paths), digest))

    def _returns_file(self, digest: str) -> Path:
        return self.folder / f"returns-{digest[:16]}.json"

    def pushed(self) -> Manifest:
        """What was copied in."""
        return self._manifest("pushed.jsonl")

    def base(self) -> Manifest:
        """What the project has of the guest's tree: what was pushed, and what was accepted since."""
        return self._manifest("base.jsonl") if (self.folder / "base.jsonl").exists() else self.pushed()

    def base_of_return(self) -> Manifest:
        """The same for what lies in quarantine: the guest may have been rolled back since, to a tree of before."""
        return self._manifest(_OF_RETURN) if (self.folder / _OF_RETURN).exists() else self.base()

    def keep_base_in(self, fresh: Path) -> None:
        """Copy the base into what has just come back. Raises HostError if the disk is full."""
        name = "base.jsonl" if (self.folder / "base.jsonl").exists() else "pushed.jsonl"
        with disk_errors("keeping what came back"):
            shutil.copyfile(self.folder / name, fresh / "base.jsonl")

    def set_base(self, before: Manifest, now: Manifest) -> None:
        """Note what the project has after changes were accepted; before: as `base_of_return` gave it."""
        stands = self.base() == before  # else the guest has another tree than the one that came back
        for name in (_OF_RETURN, *(["base.jsonl"] if stands else [])):
            fresh = self.folder / f"{name}.new"
            with suppress(FileNotFoundError):  # a push has removed the quarantine meanwhile
                fresh.write_bytes(b"".join(now.lines()))
                fresh.replace(self.folder / name)

    def quarantine(self) -> Quarantine:
        """What came back last. Raises UserInputError if nothing did; GuestError or HostError if it is damaged."""
        folder = self.folder / "quarantine"
        if not folder.is_dir():
            raise UserInputError(
                f"nothing of session {self.id} waits to be accepted",
                resolution="`vmsandbox changes NAME` fetches them while the guest runs; `stop` does not",
            )
        return Quarantine.load(folder)

    def drop_return(self) -> int:
        """Remove what came back: another push cannot judge it. Returns how many changes of it were not accepted."""
        waiting = 0
        if (self.folder / _OF_RETURN).exists():
            with suppress(VmsandboxError):
                waiting = sum(compare(self.base_of_return(), self.quarantine().manifest).counts.values())
        (self.folder / "base.jsonl").unlink(missing_ok=True)
        with suppress(OSError):
            shutil.rmtree(put_aside(self.folder / "quarantine"))
        return waiting

    def _manifest(self, name: str) -> Manifest:
        try:
            return parse_untrusted_manifest([(self.folder / name).read_bytes()], _LIMITS)
        except FileNotFoundError:
            raise UserInputError(f"nothing was copied into session {self.id}") from None
        except (OSError, VmsandboxError) as error:
            raise HostError(f"the record of session {self.id} is damaged: {name}", details=str(error)) from error


def find_record(layout: Layout, name: str) -> Record:
    """The record of a live session, of a session id, or of the newest session that had this name.

    Raises:
        UserInputError: there is none.
    """
    with suppress(VmsandboxError):
        return Record(layout.records / SessionFolder(layout, name).info().id)
    ended = sorted(layout.records.glob("*")) if layout.records.is_dir() else []
    matching = [path for path in ended if name in (path.name, path.name[16:-7])]
    if not matching:
        raise UserInputError(
            f"no session was ever called {shown(name)!r} here", resolution=f"look into {os.fspath(layout.records)}"
        )
    return Record(matching[-1])
