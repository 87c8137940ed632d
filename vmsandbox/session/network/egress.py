"""A guest's network, from its policy to its end: the broker, the way to it, and what it did, written down.

Without one owner of all of it, a broker could run with no one reading what it says, or a guest keep a way out after
its session. Everything that leads out ends with this object: the broker is its child, the forwarded port its
connection's. The same object serves `vmsandbox session` (in its process) and the keeper of `vmsandbox start`.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmsandbox.broker.start import Broker, Listeners, start_broker
from vmsandbox.egress.canaries import decoy_files, new_canaries
from vmsandbox.egress.compile import compile_policy
from vmsandbox.egress.values import BrokerConfig, EgressEvent, EgressKind
from vmsandbox.egress.wire import policy_to_json
from vmsandbox.errors import HostError, VmsandboxError
from vmsandbox.journal import events
from vmsandbox.monitor import Monitor
from vmsandbox.policy.values import Policy
from vmsandbox.process import Programs
from vmsandbox.review.text import shown
from vmsandbox.session.asked.variables import guest_variables
from vmsandbox.session.network.authority import make_authority
from vmsandbox.session.network.egress_log import EgressLog
from vmsandbox.session.network.guest_settings import FORWARDED, guest_network
from vmsandbox.session.network.host_addresses import own_addresses
from vmsandbox.session.state.folder import SessionFolder
from vmsandbox.session.state.info import SessionInfo
from vmsandbox.session.upkeep.freezing import freeze_guest
from vmsandbox.spec import WORKER_HOME, NetworkMode

if TYPE_CHECKING:
    from vmsandbox.guest.ssh import GuestShell
    from vmsandbox.session.network.filtered import Card

_CANARIES = 3
_BACKLOG = 256  # connections that wait for a broker that is not ready yet
BROKEN = "broker-ended"  # rule of the event that `broker.start` makes of a broker's end


@dataclass(frozen=True)
class EgressPlan:
    """What a session's network is made of. Holds the secrets' values: it is passed on, and never written down.

    placeholders: variable in the guest → what stands there for the secret. decoys: file in the guest → text.
    variables: of the policy.
    """

    mode: NetworkMode
    config: BrokerConfig
    placeholders: dict[str, str]
    decoys: dict[str, str]
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of the compiled policy's canonical JSON; placeholders, which are new each time, left out."""
        plain = policy_to_json(self.config.policy)
        for use in plain["secrets"]:
            del use["placeholder"]
        return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def guest_network(self, proxy: str | None = None) -> dict[str, Any]:
        """The `network` part of the guest's identity. proxy: `http://ADDRESS:PORT`; None: the forwarded port."""
        forwarded = f"http://{FORWARDED[0]}:{FORWARDED[1]}"
        return guest_network(
            self.config.ca_certificate,
            proxy or forwarded,
            self.placeholders,
            self.decoys,
            forwarded=proxy is None,
            chosen=self.variables,
        )


def plan_egress(
    session_id: str, mode: NetworkMode, policy: Policy, project: Path | None, learn: bool, programs: Programs
) -> EgressPlan:
    """Compile the policy, fetch the secrets, make what is the session's own.

    project: what a secret's relative file is relative to; None: this process's working folder.

    Raises:
        UserInputError: the policy or a secret's source is wrong.
        HostError: a secret cannot be fetched.
    """
    network = policy.network
    values: dict[str, str] = {}
    if network.secrets:
        from vmsandbox.session.network.secrets import read_secrets

        values = read_secrets(network.secrets, programs, os.environ, project or Path.cwd())
    placeholders = {name: f"vmsandbox-placeholder-{secrets.token_hex(16)}" for name in values}
    authority = make_authority(session_id)
    rules = compile_policy(network, placeholders=placeholders, learn=learn)
    canaries = new_canaries(_CANARIES) if rules.dlp.canaries else ()
    config = BrokerConfig(
        session=session_id,
        policy=rules,
        secrets=values,
        canaries=canaries,
        ca_certificate=authority.certificate,
        ca_key=authority.key,
        own_addresses=own_addresses(),
    )
    # In the worker's home, never in the project: they come back with nothing.
    decoys = {f"{WORKER_HOME}/{path}": content.decode() for path, content in decoy_files(canaries).items()}
    return EgressPlan(mode, config, placeholders, decoys, guest_variables(policy, os.environ))


class Egress:
    """The network of one running guest.

    Args:
        monitor: told at once of what a person must know.
    """

    def __init__(self, folder: SessionFolder, info: SessionInfo, plan: EgressPlan, monitor: Monitor) -> None:
        self.plan = plan
        self._folder = folder
        self._info = info
        self._monitor = monitor
        self._journal = folder.journal(info.id)
        self._log = EgressLog(folder.record_folder(info.id), self._journal, self._alert)
        self._broker: Broker | None = None
        self._closing = threading.Event()
        self._frozen = ""  # the UUID of the guest that was frozen: a rollback brings another
        self._card: Card | None = None

    @property
    def alive(self) -> bool:
        """Whether the broker runs."""
        return self._broker is not None and self._broker.alive

    def start(self, environment: Path, programs: Programs, listeners: Listeners | None = None) -> None:
        """Start the broker. It answers later; until then connections wait.

        Args:
            environment: the broker's (`vmsandbox.broker.environment`).
            listeners: of a filtered card; None for a socket of the session's own.

        Raises:
            HostError: it cannot be started.
        """
        given = listeners or Listeners(self._listen())
        try:
            self._broker = start_broker(self.plan.config, given, environment, programs, self._log.take)
        finally:
            if listeners is None:
                # Or connections would still be taken in, and wait for ever, when the broker is gone.
                given.proxy.close()
        # The broker has them now; nobody else needs them any more.
        self.plan = replace(self.plan, config=replace(self.plan.config, secrets={}, ca_key=""))
        policy = self.plan.config.policy
        self._journal.append(
            events.EgressOpened(
                self.plan.mode.value, self.plan.digest, policy.learn,
                [rule.pattern for rule in policy.allow], [use.name for use in policy.secrets],
            )
        )  # fmt: skip

    def forward(self, shell: GuestShell) -> None:
        """Let the guest reach the broker through this connection, as long as it stands.

        Raises:
            GuestError: the connection is gone. (`shell.wait_for_port` says whether the guest opened the port.)
        """
        shell.forward(FORWARDED, self._connect, self.plan.config.policy.limits.connections)

    def watch(self, card: Card) -> None:
        """Watch a filtered card from now on. Raises RefusedError if it is not guarded as it should be."""
        self._card = card

        def gone(reason: str) -> None:
            self._frozen = self._folder.info().uuid
            self._monitor.warning(self._frozen_text(f"its network card is not guarded any more: {shown(reason)}"))

        card.watch(gone)

    def close(self) -> None:
        """End the broker and write the totals down. Never raises; a second time does nothing."""
        self._closing.set()
        if self._broker is not None:
            self._broker.stop()
        self._log.close()
        with suppress(OSError):
            self._folder.broker_socket.unlink(missing_ok=True)

    def _listen(self) -> socket.socket:
        path = self._folder.broker_socket
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            path.unlink(missing_ok=True)  # of a keeper that was killed
            sock.bind(str(path))
            sock.listen(_BACKLOG)
        except OSError as error:
            sock.close()
            raise HostError("the broker's socket cannot be made", details=f"{path}: {error}") from error
        return sock

    def _connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.connect(str(self._folder.broker_socket))
        except OSError:
            sock.close()
            raise
        return sock

    def _alert(self, event: EgressEvent) -> None:
        """Called from the broker's thread, after the event was written down."""
        name = self._info.name
        if event.rule == BROKEN:
            if self._card is not None:
                self._card.silence()
            if not self._closing.is_set():
                self._monitor.warning(
                    f"the network of {name} is gone: the broker has ended. The command goes on without "
                    f"(`vmsandbox logs {name} --egress`)"
                )
            return
        if event.kind is not EgressKind.ALERT:
            return
        what = f"{shown(event.reason)} ({shown(event.host)}:{event.port})"
        try:
            now = self._folder.info()
        except VmsandboxError:  # it is ending
            now = self._info
        if event.more.get("freeze") != "yes" or not self.plan.config.policy.dlp.freeze or self._frozen == now.uuid:
            self._monitor.warning(f"{name}: {what}")
            return
        self._frozen = now.uuid
        try:
            freeze_guest(self._folder, now, by="broker", reason=event.reason)
        except VmsandboxError as error:
            self._monitor.warning(f"{name}: {what}; and the guest could NOT be frozen: {error.brief}")
            return
        self._monitor.warning(self._frozen_text(what))

    def _frozen_text(self, why: str) -> str:
        name = self._info.name
        return (
            f"{name} is FROZEN: {why}. `vmsandbox logs {name} --egress` shows what it asked for; "
            f"`vmsandbox thaw {name}` lets it go on, `vmsandbox stop {name}` ends it"
        )
