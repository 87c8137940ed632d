"""The network card of a filtered session, from its claim to its end.

The card is written down in the session's folder (`card.json`) before anything of it is made; what is made is found
again by the session's id alone, so `remove_card` also works for a session whose process was killed at any step.

    card = open_card(folder, info, programs)     bridge, filter, rules, sockets: before or while the guest starts
    card.attach(domain)                          plug it into the running guest, and look at what libvirt made of it
    control.request("card", **card.settings())   the guest sets it up
    card.verify()                                the kernel's rules are what was asked for, or the session is refused
    card.watch(on_gone)                          … and stay so: else the guest is frozen, then `on_gone` is told
    card.close()                                 end the watch and the sockets; `remove_card` takes the rest away
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from vmsandbox.broker.start import Listeners
from vmsandbox.errors import HostError, RefusedError, VmsandboxError
from vmsandbox.failpoints import failpoint
from vmsandbox.hypervisor.cardwatch import CardWatch, guest_runs
from vmsandbox.hypervisor.connection import Host
from vmsandbox.hypervisor.expected import ExpectedDevices
from vmsandbox.hypervisor.inforce import InForce, problems, problems_before_tap, read_in_force
from vmsandbox.hypervisor.livexml import check_live_xml
from vmsandbox.hypervisor.network import (
    choose_addresses,
    make_network,
    refuse_where_impossible,
    refuse_without_dnsmasq,
    remove_network,
    routed_networks,
    stray_names,
)
from vmsandbox.hypervisor.plugging import holds_tap, plug_in
from vmsandbox.ledger.book import Kind, Ledger
from vmsandbox.paths import Layout
from vmsandbox.process import Programs
from vmsandbox.render.domain import DomainPlan
from vmsandbox.render.network import PREFIX_BITS, PROXY_PORT, CardPlan
from vmsandbox.session.network.card_sockets import listen_on, silence, sockets_of
from vmsandbox.session.state.folder import SessionFolder, live_sessions
from vmsandbox.session.state.info import SessionInfo
from vmsandbox.session.upkeep.freezing import freeze_guest

RECORD = "card.json"
_TRIES = 3  # for an address: another program may take it between our look and our use
_SETUP_SECONDS = 20  # for the guest to find its card and set it up
_FREEZE_SECONDS = 3  # for libvirt to stop the guest; then its process is stopped


class Card:
    """One filtered card. Made by `open_card`; `reopen_card` for a process that takes a running session over."""

    def __init__(self, folder: SessionFolder, info: SessionInfo, plan: CardPlan, programs: Programs) -> None:
        self.plan = plan
        self._folder = folder
        self._info = info
        self._programs = programs
        self._listeners: Listeners | None = None
        self._first: InForce | None = None
        self._watch: CardWatch | None = None
        self._on_gone: Callable[[str], None] = lambda _reason: None

    @property
    def proxy(self) -> str:
        """The explicit proxy, as the guest sees it: `http://ADDRESS:PORT`."""
        return f"http://{self.plan.host_address}:{PROXY_PORT}"

    def settings(self) -> dict[str, Any]:
        """What the guest's control program is told with the operation `card`."""
        return {
            "mac": self.plan.mac,
            "address": f"{self.plan.guest_address}/{PREFIX_BITS}",
            "dns": self.plan.host_address,
            "seconds": _SETUP_SECONDS,
        }

    def listeners(self) -> Listeners:
        """The broker's sockets on the bridge's address, bound to the bridge alone. The card keeps them, too.

        Raises:
            HostError: another program of the host listens on all addresses at one of the ports.
        """
        if self._listeners is None:
            self._listeners = listen_on(self.plan)
        return self._listeners

    def silence(self) -> None:
        """Refuse connections from now on, for a broker that is gone; the ports stay taken, so that nobody gets them."""
        if self._listeners is not None:
            silence(self._listeners)

    def attach(self, domain: DomainPlan) -> None:
        """Plug the card into the running guest and look at the devices that it has then.

        Raises:
            HostError: libvirt or QEMU refused.
            RefusedError: the live XML has something that was not asked for.
        """
        host = Host.open()
        try:
            plug_in(host, self._info.uuid, self.plan)
            check_live_xml(host.live_xml(self._info.uuid), ExpectedDevices.of(domain, self.plan))
        finally:
            host.close()

    def verify(self) -> None:
        """Read the rules in force back from the kernel. Raises RefusedError unless they are what was asked for."""
        seen = read_in_force(self.plan, self._programs)
        if wrong := problems(seen, self.plan):
            raise RefusedError(
                f"the network card is not guarded: {wrong[0]}",
                details="\n".join(wrong),
                resolution="`vmsandbox doctor` shows what the filtered card needs; "
                "a firewall of the host's that was reloaded just now takes our rules away: try again",
            )
        self._first = seen

    def verify_without_tap(self) -> None:
        """The same before the card is plugged in: our rules, and the bridge. Raises RefusedError."""
        if wrong := problems_before_tap(read_in_force(self.plan, self._programs), self.plan):
            raise RefusedError(
                f"the network card cannot be guarded: {wrong[0]}",
                details="\n".join(wrong),
                resolution="the guest goes on without; `vmsandbox stop` it, and start it anew",
            )

    def watch(self, on_gone: Callable[[str], None]) -> None:
        """Verify, and watch from now on. When the card is not guarded any more, the guest is frozen, which is an event.

        on_gone: told then why, from a thread of the watch's own. It need not freeze.
        """
        self.verify()
        self._on_gone = on_gone
        self._watch_on()

    def follow(self, info: SessionInfo) -> None:
        """The session was rolled back: watch the card of the guest that it has now, which may be about to get it."""
        if self._watch is not None:
            self._watch.close()
        self._info = info
        self._watch_on()

    def _watch_on(self) -> None:
        assert self._first is not None
        info = self._info  # an old watch that is slow to end must not judge the guest that came

        def frozen(reason: str) -> None:
            if self._freeze(info, reason):
                self._on_gone(reason)

        runs, is_away = partial(self._guest_runs, info), partial(self._is_away, info)
        self._watch = CardWatch(self.plan, self._first, self._programs, runs, is_away, frozen)

    def close(self) -> None:
        """End the watch and close the sockets; bridge, filter and rules stay until `remove_card`. Never raises."""
        if self._watch is not None:
            self._watch.close()
        if self._listeners is not None:
            listeners, self._listeners = self._listeners, None
            for sock in sockets_of(listeners):
                sock.close()

    def _guest_runs(self, info: SessionInfo) -> bool:
        return guest_runs(info.uuid, self._folder.pid_file(info))

    def _is_away(self, info: SessionInfo) -> bool:
        with suppress(OSError, ValueError):
            return not holds_tap(self._folder.qemu_pid(info))
        return False

    def _freeze(self, info: SessionInfo, reason: str) -> bool:
        """Stop the guest: by libvirt, else its process. False if it is gone by itself."""
        words = f"its network card is not guarded any more: {reason}"
        late = threading.Timer(_FREEZE_SECONDS, self._stop_process, [info])
        late.daemon = True
        late.start()
        try:
            freeze_guest(self._folder, info, by="network", reason=words)
        except (VmsandboxError, OSError):
            if not self._guest_runs(info):
                return False
            self._stop_process(info)
        finally:
            late.cancel()
        return True

    def _stop_process(self, info: SessionInfo) -> None:
        with suppress(OSError, ValueError):
            pid = self._folder.qemu_pid(info)
            descriptor = os.pidfd_open(pid)
            try:
                if self._guest_runs(info):
                    signal.pidfd_send_signal(descriptor, signal.SIGSTOP)
            finally:
                os.close(descriptor)


def open_card(folder: SessionFolder, info: SessionInfo, programs: Programs, host: Host) -> Card:
    """Make a session's bridge, filter and rules; the guest need not be there yet. What fails here is taken back.

    Raises:
        RefusedError: this host or user cannot have one.
        HostError: libvirt or nft refused, or there is no address left.
    """
    refuse_where_impossible(host.uri)
    refuse_without_dnsmasq(programs)
    for left in range(_TRIES - 1, -1, -1):
        seed = f"{info.id} {left}"
        addresses = choose_addresses(seed, routed_networks(programs))
        plan = CardPlan(info.id, folder.layout.live, *addresses)
        _write_down(folder, plan)
        Ledger.of(folder.layout).plan(info.id, (Kind.NETWORK, plan.name))
        try:
            make_network(host, plan, programs)
            failpoint("card.made")
            return Card(folder, info, plan, programs)
        except BaseException as error:
            remove_network(host, plan.name, programs)
            (folder.path / RECORD).unlink(missing_ok=True)
            if not left or not isinstance(error, HostError) or "already in use" not in error.details:
                raise
    raise AssertionError("unreachable")


def reopen_card(folder: SessionFolder, info: SessionInfo, programs: Programs) -> Card:
    """The card of a session that runs already, for a process that takes it over. Raises HostError if it has none."""
    return Card(folder, info, read_plan(folder), programs)


def read_plan(folder: SessionFolder) -> CardPlan:
    """What was written down of a session's card. Raises HostError."""
    path = folder.path / RECORD
    try:
        record = json.loads(path.read_text())
        ports = tuple(int(port) for port in record["tcp_ports"])
        plan = CardPlan(
            record["session_id"], Path(record["home"]), record["host_address"], record["guest_address"], ports
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HostError(
            "the record of the session's network card cannot be read", details=f"{path}: {error}"
        ) from error
    return plan


def remove_card(folder: SessionFolder, info: SessionInfo, programs: Programs | None = None) -> None:
    """Remove a session's bridge, filter and rules; nothing to do for a session that has no card. Twice is harmless.

    The guest must be gone.

    Raises:
        HostError: something of it is left; `details` says what.
    """
    if not (folder.path / RECORD).exists():
        return
    host = Host.open()
    try:
        name = CardPlan(info.id, folder.layout.live, "", "").name
        if left := remove_network(host, name, programs or Programs()):
            raise HostError("the session's network could not be removed", details="; ".join(left))
        Ledger.of(folder.layout).gone(info.id, (Kind.NETWORK, name))
    finally:
        host.close()


def remove_stray_cards(layout: Layout, host: Host, programs: Programs | None = None) -> list[tuple[str, list[str]]]:
    """Remove the networks of this installation that belong to no session; each one's name, and what is left of it."""
    try:
        refuse_where_impossible(host.uri)
    except RefusedError:
        return []  # nobody could have made one
    runner = programs or Programs()
    if runner.find("nft") is None:
        return []
    strays = stray_names(host, layout.live, runner)
    if strays:
        for folder in live_sessions(layout):
            # by either of its records: a session of which one is damaged may still run
            with suppress(VmsandboxError):
                strays.discard(read_plan(folder).name)
            with suppress(VmsandboxError):
                strays.discard(CardPlan(folder.info().id, layout.live, "", "").name)
    return [(name, remove_network(host, name, runner)) for name in sorted(strays)]


def _write_down(folder: SessionFolder, plan: CardPlan) -> None:
    record = {**asdict(plan), "home": str(plan.home)}
    try:
        (folder.path / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True))
    except OSError as error:
        raise HostError("the session's card cannot be written down", details=str(error)) from error
