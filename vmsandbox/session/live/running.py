"""A running session, as this process reaches it: its records, its connection, its end. What works on one takes this."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vmsandbox.errors import UserInputError, VmsandboxError
from vmsandbox.guest.control import connect_ssh
from vmsandbox.hypervisor.isolation import Isolation
from vmsandbox.journal import events
from vmsandbox.journal.chain import Journal
from vmsandbox.monitor import Monitor
from vmsandbox.paths import Layout
from vmsandbox.session.live.ending import end_session
from vmsandbox.session.network.networking import GuestNetwork, NetworkToCome
from vmsandbox.session.state.activity import note_activity
from vmsandbox.session.state.folder import SessionFolder
from vmsandbox.session.state.info import SessionInfo
from vmsandbox.session.upkeep.clock import mend_clock
from vmsandbox.spec import WORKER, NetworkMode

if TYPE_CHECKING:
    from vmsandbox.guest.ssh import GuestShell

LOGIN_DEADLINE = 30  # seconds


class RunningSandbox:
    """A running session."""

    def __init__(self, layout: Layout, folder: SessionFolder, info: SessionInfo, monitor: Monitor) -> None:
        self.layout = layout
        self.folder = folder
        self.info = info
        self.monitor = monitor
        self.isolation: Isolation | None = None
        self._journal: Journal | None = None
        self._shell: GuestShell | None = None
        self._port = ExitStack()
        self.network: GuestNetwork | None = None
        self.network_to_come: NetworkToCome | None = None
        self.differs: tuple[str, ...] = ()  # after its end: what is not as it was before (`resources.baseline`)
        self.project_is_open = False  # whether the policy's guard over the project is down (`transfer.enforced`)

    @property
    def name(self) -> str:
        """The session's name."""
        return self.info.name

    @property
    def journal(self) -> Journal:
        """The session's journal."""
        if self._journal is None:
            self._journal = self.folder.journal(self.info.id)
        return self._journal

    def shell(self) -> GuestShell:
        """The SSH connection of this object, made on first use."""
        note_activity(self.folder)
        mend_clock(self.folder, self.info)
        if self._shell is None or not self._shell.is_open:
            from vmsandbox.guest.ssh import GuestShell

            self.disconnect()
            keys = self.folder.keys()
            port = self._port.enter_context(self.folder.ssh_port(self.info.ssh_ports))
            sock = connect_ssh(self.folder.ssh_socket(port), LOGIN_DEADLINE)
            self._shell = GuestShell.connect(
                sock, user=WORKER, host_key=keys.host_key, user_key=keys.user_key, deadline=LOGIN_DEADLINE
            )
            if self.network is not None:
                self.network.join(self._shell)
        return self._shell

    def start(self, command: Sequence[str] | None, *, terminal: tuple[str, int, int] | None = None) -> Any:
        """Start a command (None: a login shell) in the project's folder; returns its SSH channel."""
        shell = self.shell()  # first: where no port is free, no command was started
        self.journal.append(events.CommandStarted(list(command) if command else None, terminal is not None))
        channel = shell.start(command, cwd=self.info.guest_folder, terminal=terminal)
        if self.network is not None:
            self.network.check(shell)
        return channel

    def ended(self, status: int, seconds: float) -> None:
        """Write down that a command started with `start` has ended."""
        self.journal.append(events.CommandEnded(status, round(seconds, 3)))

    def close(self, reason: str = "ended") -> list[str]:
        """End the guest and remove everything of the session but its record; returns what could not be removed."""
        self.hang_up()
        if self.network_to_come is not None:
            self.network_to_come.close()
        ended = end_session(self.layout, self.folder, self.info, reason)
        self.differs = ended.differs
        return list(ended.left)

    def disconnect(self) -> None:
        """Give the SSH port back; the guest goes on."""
        shell, self._shell = self._shell, None
        with self._port:
            if shell is not None:
                shell.leave()

    def hang_up(self) -> None:
        """The same for a guest that is to end: nothing is waited for."""
        shell, self._shell = self._shell, None
        with self._port:
            if shell is not None:
                shell.close()

    def failed(self, error: BaseException) -> None:
        """Write down why it did not come up, and remove what there is of it."""
        brief = error.brief if isinstance(error, VmsandboxError) else f"interrupted ({type(error).__name__})"
        details = error.details if isinstance(error, VmsandboxError) else str(error)
        with suppress(VmsandboxError):
            self.journal.append(events.SessionFailed(brief, details))
        self.close("failed to start")

    def keep(self) -> None:
        """Let the guest outlive this process, until `stop`. A network that this process holds ends here."""
        if self.network is not None and self.network.egress is not None:
            self.network.close()
            self.info = replace(self.current(), network=NetworkMode.NONE.value)
            self.folder.update(self.info)
        self.disown()

    def disown(self) -> None:
        """No process has to end the session any more."""
        self.info = replace(self.current(), owner_pid=0, owner_started=0)
        self.folder.update(self.info)

    def current(self) -> SessionInfo:
        """The session's record as it is now: another process may have rolled it back. Raises UserInputError."""
        now = self.folder.info()
        if now.id != self.info.id:
            raise UserInputError(f"session {self.name!r} has ended meanwhile")
        return now
