"""The policy that holds for a session: the organisation's file, the person's, and the one that was named or found.

Without one place for it, Python's interface would not be held to what the command line is.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vmsandbox.errors import RefusedError
from vmsandbox.monitor import Monitor
from vmsandbox.policy.merging.effective import Effective, effective_policy
from vmsandbox.policy.values import Policy
from vmsandbox.spec import NetworkMode

if TYPE_CHECKING:
    from vmsandbox.session.asked.request import SessionRequest


def held(asked: SessionRequest, named: Policy | Path | None, monitor: Monitor) -> SessionRequest:
    """The request with the policy that holds.

    Args:
        named: a policy, or its file; None: the project's own, if it has one.

    Raises:
        UserInputError, RefusedError, HostError: see `effective_policy`; or the project's own policy asks for something
            of the host.
    """
    effective = effective_for(asked.project, named)
    asked = replace(asked, policy=effective.policy, held=True)
    network = asked.policy.network
    if effective.own is not None and named is None:
        _refuse_reach(effective.own.policy, asked.mode is not NetworkMode.NONE)
    if asked.mode is NetworkMode.NONE and (network.allowed_hosts or network.rules):
        why = "--net none" if asked.network else f"the policy's network.mode is {network.mode or 'not set'}"
        monitor.notice(f"the hosts that the policy allows are not reached: the guest has no network ({why})")
    return asked


def effective_for(project: Path | None, named: Policy | Path | None) -> Effective:
    """The policy of a project, or the one that was named, within the wider files."""
    if isinstance(named, Policy):
        return effective_policy(None, given=named)
    from vmsandbox.policy.load import find_policy

    found = find_policy(project) if named is None and project is not None and project.is_dir() else None
    return effective_policy(named or found)


def _refuse_reach(policy: Policy, has_network: bool) -> None:
    """A policy that was found in the project gets nothing of this host; one that a person named does."""
    from vmsandbox.policy.merging.consent import reaches_into_host
    from vmsandbox.review.text import shown

    if wanted := reaches_into_host(policy, network=has_network):
        raise RefusedError(
            "the project's own policy asks for something of this host, and nobody has named it",
            details="\n".join(shown(line, 300) for line in wanted),
            resolution=f"read it; then name it: --policy {policy.source} (--net none goes on without the network's)",
        )
