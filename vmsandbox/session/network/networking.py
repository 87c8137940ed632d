"""Who holds the network of a session: this process, or a keeper that outlives it.

Without the choice in one place, `start` would have to stay in its terminal, or every `session` would pay for a second
process and a second login.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmsandbox.guest.control import ControlPort
from vmsandbox.monitor import Monitor
from vmsandbox.process import Programs
from vmsandbox.render.domain import DomainPlan
from vmsandbox.session.asked.request import Prepared, SessionRequest
from vmsandbox.session.state.folder import SessionFolder
from vmsandbox.session.state.info import SessionInfo
from vmsandbox.spec import NetworkMode

if TYPE_CHECKING:
    from vmsandbox.guest.ssh import GuestShell
    from vmsandbox.session.network.egress import Egress
    from vmsandbox.session.network.filtered import Card
    from vmsandbox.session.network.keeper import Keeper

CARD_DEADLINE = 30.0  # seconds: what the guest may take to find its card and set it up
KEEPER_DEADLINE = 45.0  # seconds: its login, behind a guest that is busy with a push


@dataclass
class GuestNetwork:
    """What leads out of one guest: exactly one of both is there.

    identity: what the guest is told of it. card: of a filtered guest; `alarm` is told when it is not guarded any more.
    """

    identity: dict[str, Any]
    egress: Egress | None = None
    keeper: Keeper | None = None
    card: Card | None = None

    def join(self, shell: GuestShell) -> None:
        """A connection of this process stands: lead the guest's port through it, if this process holds the network."""
        if self.egress is not None and self.card is None:
            self.egress.forward(shell)

    def guest_is_up(self, domain: DomainPlan) -> None:
        """The guest has its identity, and its keys are kept: give it its card, and let the keeper log in.

        Raises:
            RefusedError, HostError, GuestError: the card could not be plugged in, set up, or is not guarded.
        """
        if self.card is not None:
            self.card.attach(domain)
            with closing(ControlPort(domain.control_socket)) as control:
                control.request("card", deadline=CARD_DEADLINE, **self.card.settings())
            if self.egress is not None:
                self.egress.watch(self.card)
        if self.keeper is not None:
            self.keeper.go()

    def wait_for_keeper(self) -> None:
        """Until the guest reaches its broker through the keeper. Raises GuestError if it does not."""
        if self.keeper is not None:
            self.keeper.wait_until_it_forwards(KEEPER_DEADLINE)

    def check(self, shell: GuestShell) -> None:
        """Raises GuestError if the guest did not open its port. A command that has started was answered after it."""
        if self.egress is not None and self.card is None:
            shell.wait_for_port()

    def close(self) -> None:
        """End what this process holds (a keeper is ended by the teardown)."""
        if self.egress is not None:
            self.egress.close()
        if self.card is not None:
            self.card.close()


class NetworkToCome:
    """A network that is made while the guest starts: the policy, the secrets, the authority, the broker's start."""

    def __init__(
        self, asked: SessionRequest, prepared: Prepared, folder: SessionFolder, info: SessionInfo,
        programs: Programs, monitor: Monitor,
    ) -> None:  # fmt: skip
        self._future: Future[GuestNetwork] | None = None
        if asked.mode is NetworkMode.NONE:
            return
        pool = ThreadPoolExecutor(1, "network")
        try:
            self._future = pool.submit(_open, asked, prepared, folder, info, programs, monitor)
        finally:
            pool.shutdown(wait=False)

    def result(self) -> GuestNetwork | None:
        """It, made; None for a guest without. Raises what made it fail."""
        return None if self._future is None else self._future.result()

    def close(self) -> None:
        """End it, also if it is still being made."""
        if self._future is not None:
            with suppress(Exception):  # what made it fail was raised by `result`; the teardown must go on
                self._future.result().close()


def _open(
    asked: SessionRequest, prepared: Prepared, folder: SessionFolder, info: SessionInfo,
    programs: Programs, monitor: Monitor,
) -> GuestNetwork:  # fmt: skip
    from vmsandbox.session.network.egress import Egress, plan_egress
    from vmsandbox.session.network.keeper import start_keeper

    assert prepared.broker is not None
    plan = plan_egress(info.id, asked.mode, asked.policy, asked.project, asked.learn, programs)
    card = _open_card(folder, info, programs) if asked.mode is NetworkMode.FILTERED else None
    identity = plan.guest_network(card.proxy if card else None)
    if asked.keep:
        return GuestNetwork(identity, keeper=start_keeper(folder, plan, prepared.broker, programs), card=card)
    egress = Egress(folder, info, plan, monitor)
    try:
        egress.start(prepared.broker, programs, card.listeners() if card else None)
    except BaseException:
        egress.close()
        if card is not None:
            card.close()
        raise
    return GuestNetwork(identity, egress=egress, card=card)


def _open_card(folder: SessionFolder, info: SessionInfo, programs: Programs) -> Card:
    from vmsandbox.hypervisor.connection import Host
    from vmsandbox.session.network.filtered import open_card

    host = Host.open()
    try:
        return open_card(folder, info, programs, host)
    finally:
        host.close()
