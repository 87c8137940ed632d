"""A session's folders on the host, and who may use which port.

`live/<name>/` is made before anything else of a session and removed after everything else: its existence is the
claim on the name, and its record says what the session is and who has to end it. What of it may still be there when
the folder is not, the ledger knows (`vmsandbox.ledger`). `records/<id>/` stays.
What is in them: ARCHITECTURE.md, "A session's folders".
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from vmsandbox.errors import GuestError, HostError, UserInputError
from vmsandbox.failpoints import failpoint
from vmsandbox.guest.ask import AskPort
from vmsandbox.guest.bulk import BulkPort
from vmsandbox.journal.chain import Journal
from vmsandbox.ledger.processes import Process
from vmsandbox.paths import Layout, checked_session_name
from vmsandbox.session.state.info import Halfway, SessionInfo, SessionKeys, write_text

_NEXT = "next.json"


class SessionFolder:
    """The live folder of one session."""

    def __init__(self, layout: Layout, name: str) -> None:
        self.layout = layout
        self.name = checked_session_name(name)
        self.path = layout.live / name
        self.net = layout.run / f"{name}.net"  # no session's name has a dot

    @property
    def run(self) -> Path:
        """The folder of the sockets. Raises like `info`."""
        return self.sockets(self.info())

    def sockets(self, info: SessionInfo) -> Path:
        """The same, of a known guest.

        Each guest has its own, also where a name is used again or the session was rolled back: libvirt removes a
        guest's sockets by their paths, and may do so seconds after the guest's end.
        """
        return self.layout.run / f"{self.name}-{info.uuid[-6:]}"

    def all_sockets(self) -> list[Path]:
        """The folders of sockets that sessions of this name may have left."""
        return sorted(self.layout.run.glob(self.name + "-" + "[0-9a-f]" * 6))

    def vm(self, info: SessionInfo) -> Path:
        """Files that a guest's QEMU opens."""
        return self.path / f"vm-{info.uuid[-6:]}"

    def pid_file(self, info: SessionInfo) -> Path:
        """Where the number of a guest's QEMU process is written down."""
        return self.path / f"qemu-{info.uuid[-6:]}.pid"

    def qemu_pid(self, info: SessionInfo) -> int:
        """It. Raises OSError or ValueError where it is not known."""
        return int(self.pid_file(info).read_text())

    def guest_is_alive(self, info: SessionInfo) -> bool:
        """Whether the session's own QEMU process runs."""
        with suppress(OSError, ValueError):
            return info.uuid.encode() in Path(f"/proc/{self.qemu_pid(info)}/cmdline").read_bytes()
        return False

    @property
    def snapshots(self) -> Path:
        """The folder of its snapshots."""
        return self.path / "snapshots"

    def claim(self, info: SessionInfo) -> None:
        """Take the name. Raises UserInputError if it is taken, HostError if the disk is full or read-only."""
        # Whose it is, so that `gc` leaves a claim alone that is being made at this moment.
        me = Process.here()
        staged = self.layout.live / f".{self.name}.{me.pid}.{me.started}.{secrets.token_hex(4)}"
        try:
            for parent in (self.layout.live, self.layout.run):
                parent.mkdir(mode=0o711, parents=True, exist_ok=True)
            staged.mkdir(mode=0o711)
            failpoint("claim.staged")
            _write(staged / "session.json", asdict(info))
            failpoint("claim.written")
            # A rename to a folder that exists and is not empty fails: one of two claims wins.
            staged.rename(self.path)
        except OSError as error:
            shutil.rmtree(staged, ignore_errors=True)
            if self.path.exists():
                raise UserInputError(
                    f"a session named {self.name!r} exists already",
                    resolution=f"use another --name, or end it with `vmsandbox stop {self.name}`",
                ) from None
            raise HostError(
                "the session's folder cannot be made",
                details=str(error),
                resolution="`vmsandbox gc` gives space back; `vmsandbox doctor` shows what there is",
            ) from error
        failpoint("claim.made")

    def is_of(self, info: SessionInfo) -> bool:
        """Whether the name is this very session's, by a record that can be read."""
        with suppress(HostError, UserInputError):
            return self.info().id == info.id
        return False

    def info(self) -> SessionInfo:
        """What was written down. Raises UserInputError if there is no such session."""
        try:
            return SessionInfo(**json.loads((self.path / "session.json").read_text()))
        except FileNotFoundError:
            raise UserInputError(
                f"there is no session named {self.name!r}", resolution="`vmsandbox ls` shows those that run"
            ) from None
        except (OSError, ValueError, TypeError) as error:
            raise HostError(
                f"the record of session {self.name!r} cannot be read",
                details=f"{self.path / 'session.json'}: {error}",
                resolution=f"if it is damaged, `vmsandbox stop {self.name}` removes the session",
            ) from error

    def update(self, info: SessionInfo) -> None:
        """Write the record anew, in one step."""
        _write(self.path / "session.json", asdict(info))

    def begin_halfway(self, halfway: Halfway) -> None:
        """Write down that another guest is made for the session. Raises OSError."""
        _write(self.path / _NEXT, asdict(halfway))

    def end_halfway(self) -> None:
        """One of the two guests is gone, and all of it."""
        (self.path / _NEXT).unlink(missing_ok=True)

    @property
    def is_without_record(self) -> bool:
        """Whether there is a folder, and nothing that says of what: none is ever made so."""
        return self.path.is_dir() and not (self.path / "session.json").exists()

    @property
    def is_between_guests(self) -> bool:
        """Whether a rollback is under way, or was broken off."""
        return (self.path / _NEXT).exists()

    def halfway(self) -> Halfway | None:
        """What `begin_halfway` wrote down. Raises HostError if it cannot be read."""
        path = self.path / _NEXT
        try:
            written = json.loads(path.read_text())
            return Halfway(SessionInfo(**written["before"]), SessionInfo(**written["coming"]), str(written["tag"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise HostError(
                f"the record of a rollback of session {self.name!r} cannot be read",
                details=f"{path}: {error}",
                resolution=f"`vmsandbox stop {self.name}` removes the session",
            ) from error

    @property
    def identity_file(self) -> Path:
        """The session's private key, as OpenSSH's clients take it."""
        return self.path / "id_ed25519"

    @property
    def known_hosts_file(self) -> Path:
        """The pinned host key, as OpenSSH's clients take it."""
        return self.path / "known_hosts"

    @property
    def ssh_host(self) -> str:
        """The name by which OpenSSH's clients know the guest."""
        return f"vmsandbox-{self.name}"

    def save_keys(self, keys: SessionKeys) -> None:
        """Keep the keys for later commands."""
        write_text(self.known_hosts_file, f"{self.ssh_host} {keys.host_key}\n")
        write_text(self.identity_file, keys.user_key)

    def keys(self) -> SessionKeys:
        """The keys. Raises GuestError while the session is still starting."""
        try:
            host_key = self.known_hosts_file.read_text().split(" ", 1)[1].strip()
            return SessionKeys(host_key, self.identity_file.read_text())
        except (OSError, IndexError):
            raise GuestError(
                f"session {self.name!r} is still starting, or failed to",
                resolution=f"`vmsandbox logs {self.name}` shows how far it came",
            ) from None

    def record_folder(self, session_id: str) -> Path:
        """Where what outlives the session is kept."""
        return self.layout.records / session_id

    def journal(self, session_id: str) -> Journal:
        """The session's journal (its folder is made)."""
        folder = self.record_folder(session_id)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise HostError("the session's record folder cannot be made", details=str(error)) from error
        return Journal(folder / "events.jsonl")

    @contextmanager
    def ssh_port(self, count: int) -> Iterator[int]:
        """Use a free SSH port: its number. Each port carries one connection at a time.

        Raises:
            GuestError: all are in use.
        """
        for number in range(count):
            fd = os.open(self.path / f"port.{number}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                continue
            try:
                yield number
            finally:
                os.close(fd)
            return
        raise GuestError(
            f"all {count} SSH ports of session {self.name!r} are in use",
            resolution="end one of its shells, commands or proxies, or start it with more --ssh-ports",
        )

    @property
    def keeper_log(self) -> Path:
        """What the keeper of its network had to say."""
        return self.path / "keeper.log"

    @property
    def broker_socket(self) -> Path:
        """Where the session's broker listens."""
        return self.net / "broker"

    @contextmanager
    def bulk_port(self) -> Iterator[BulkPort]:
        """The port through which a project goes in, for one at a time.

        Raises:
            GuestError: another process uses it.
        """
        with os.fdopen(os.open(self.path / "port.bulk", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise GuestError(
                    f"something is being copied into session {self.name!r} already", resolution="try again afterwards"
                ) from None
            port = BulkPort(self.run / "bulk")
            try:
                yield port
            finally:
                port.close()

    @contextmanager
    def ask_port(self) -> Iterator[AskPort | None]:
        """The port on which the guest asks about commands; None if another process answers already, or none can."""
        with os.fdopen(os.open(self.path / "port.ask", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                port = AskPort(self.run / "ask")
            except (BlockingIOError, GuestError):
                yield None
                return
            try:
                yield port
            finally:
                port.close()

    def ssh_socket(self, port: int) -> Path:
        """The host's end of SSH port number `port`."""
        return self.run / f"ssh.{port}"


def live_sessions(layout: Layout) -> list[SessionFolder]:
    """Every session that has a folder, by name."""
    if not layout.live.is_dir():
        return []
    return [SessionFolder(layout, path.name) for path in sorted(layout.live.iterdir()) if path.name[0] != "."]


def guests_of(folder: SessionFolder, info: SessionInfo) -> Iterator[int]:
    """A descriptor (pidfd) of a session's QEMU process; when it is asked for the next, that of the guest which came in
    its place, if the session was rolled back. Raises OSError or ValueError where it is not known or gone.
    """
    while True:
        descriptor = os.pidfd_open(folder.qemu_pid(info))
        try:
            yield descriptor
        finally:
            os.close(descriptor)
        before = info
        with suppress(GuestError, HostError, UserInputError):
            info = folder.info()
        if info.id != before.id or info.uuid == before.uuid:
            return


def _write(path: Path, value: dict[str, object]) -> None:
    write_text(path, json.dumps(value, indent=1, sort_keys=True))
