"""Runs the `command` rules of a project on what came back, in a fresh guest of their own.

Never on the host: the commands read the guest's files, and such a tool can be made to run what it reads. Never in the
guest that the agent worked in either: whoever owns that guest also decides how a command there ends.
"""

from __future__ import annotations

from dataclasses import replace

from vmsandbox.errors import GuestError, VmsandboxError
from vmsandbox.guest.pack import pack_returned
from vmsandbox.monitor import Monitor
from vmsandbox.paths import Layout
from vmsandbox.policy.values import Policy
from vmsandbox.review.manifest import Manifest
from vmsandbox.review.rules import CommandRule, command_findings
from vmsandbox.review.values import Contents, Finding
from vmsandbox.session.asked.request import SessionRequest
from vmsandbox.session.sandbox import Sandbox
from vmsandbox.spec import PROJECTS, NetworkMode

COMMAND_DEADLINE = 600.0  # seconds
_NOT_RUN = 126


def run_command_rules(
    rules: tuple[CommandRule, ...],
    tree: Manifest,
    contents: Contents,
    request: SessionRequest,
    layout: Layout,
    monitor: Monitor,
) -> tuple[Finding, ...]:
    """What the rules say about a tree; nothing where each of them ended with status 0.

    request: what kind of guest (image, size); nothing else of it is used.

    A rule that could not be run at all (no guest, no end in ten minutes) is a finding too.
    """
    findings: list[Finding] = []
    if not rules:
        return ()
    try:
        policy = Policy(
            image=request.policy.image, isolation=request.policy.isolation, resources=request.policy.resources
        )
        fresh = replace(
            request,
            project=None,
            name=None,
            policy=policy,
            keep=False,
            network=NetworkMode.NONE,
            learn=False,
            held=True,
        )
        with Sandbox.open(request=fresh, layout=layout, monitor=monitor) as guest:
            folder = f"{PROJECTS}/project"
            _send(guest, folder, tree, contents)
            for rule in rules:
                with monitor.step(f"rule {rule.id} in a fresh guest"):
                    findings += _one(guest, folder, rule)
    except VmsandboxError as error:
        why = f"{error.brief}: {error.details}".encode()
        return tuple(finding for rule in rules for finding in command_findings(rule, _NOT_RUN, why))
    return tuple(findings)


def _one(guest: Sandbox, folder: str, rule: CommandRule) -> tuple[Finding, ...]:
    try:
        status, untrusted_out, untrusted_err = guest.shell().run(
            ["sh", "-c", f'cd "$1" && {{\n{rule.command}\n}}', "sh", folder], timeout=COMMAND_DEADLINE
        )
    except GuestError as error:
        return command_findings(rule, _NOT_RUN, error.brief.encode())
    return command_findings(rule, status, untrusted_out + untrusted_err)


def _send(guest: Sandbox, folder: str, tree: Manifest, contents: Contents) -> None:
    from vmsandbox.guest.ssh import exit_status

    channel = guest.shell().start(
        ["sh", "-c", 'mkdir -m 0700 -- "$1" && exec tar -x -p --no-same-owner -f - -C "$1"', "sh", folder]
    )
    try:
        pack_returned(tree, contents, channel.sendall)
        channel.shutdown_write()
        if (status := exit_status(channel, COMMAND_DEADLINE)) != 0:
            raise GuestError(f"the guest did not take the tree: tar ended with status {status}")
    except OSError as error:
        raise GuestError("the guest stopped taking the tree", details=str(error)) from error
    finally:
        channel.close()
