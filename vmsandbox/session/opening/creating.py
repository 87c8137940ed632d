"""Runs a policy's own command (`session.post_create`) once, in a guest that becomes a template.

Without it each session would install what a project needs anew. It runs on top of the image's template and below the
policy's: with the policy's network (through a broker of its own) and what it reads of the project, before the rules
about files, commands and system calls hold. So another rule does not run it again; another file that it reads does.

The guest is a session like any other, with a name, a record and a journal, until its identity is taken away again
(cloudinit/guest/vmsandbox_forget.py): what the worker has in its home then, outside of the project, is what stays.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import uuid as uuids
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from vmsandbox.errors import GuestError, UserInputError
from vmsandbox.guest.control import ControlPort
from vmsandbox.guest.pack import pack
from vmsandbox.guest.walk import Walk, walk_project
from vmsandbox.hypervisor import growing
from vmsandbox.hypervisor.connection import Host
from vmsandbox.hypervisor.files import sha256_of
from vmsandbox.hypervisor.freezing import freeze, publish
from vmsandbox.hypervisor.launch import disk_errors
from vmsandbox.hypervisor.making import find_or_make
from vmsandbox.hypervisor.template import STATE, Template, TemplatePlan, TemplateStore
from vmsandbox.monitor import Monitor
from vmsandbox.paths import Layout
from vmsandbox.policy.fetchers import shown_command
from vmsandbox.policy.values import Policy, SessionPolicy
from vmsandbox.process import Programs
from vmsandbox.render.confinement import SHELL
from vmsandbox.session.asked.request import Prepared, SessionRequest
from vmsandbox.session.live.running import RunningSandbox
from vmsandbox.session.opening.created_files import select_files
from vmsandbox.session.opening.creating_command import run_command
from vmsandbox.session.opening.starting import claim, start_guest, write_opened
from vmsandbox.session.transfer.project import push_project
from vmsandbox.spec import NO_LIMITS, NetworkMode

FORGET_DEADLINE, SETTLE_DEADLINE = 60.0, 120.0  # seconds
_CODE = (Path(__file__), Path(growing.__file__), Path(__file__).with_name("creating_command.py"))


@dataclass(frozen=True)
class Creation:
    """All that the command's result depends on.

    policy: what holds while it runs. listing: digest of the manifest of what it can read of the project.
    """

    base: Template
    command: tuple[str, ...]
    policy: Policy
    mode: NetworkMode
    listing: str | None

    @property
    def key(self) -> str:
        """SHA-256 over it, in hexadecimal (the first 32 characters)."""
        inputs = {
            "base": self.base.key,
            "command": self.command,
            "variables": self.policy.session.variables,
            # What could be fetched: a template must not bring what today's policy would refuse.
            "network": None if self.mode is NetworkMode.NONE else asdict(self.policy.network),
            "files": self.listing,
            "code": [sha256_of(path) for path in _CODE],
        }
        return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:32]


def created_template(
    host: Host,
    asked: SessionRequest,
    prepared: Prepared,
    plan: TemplatePlan,
    layout: Layout,
    programs: Programs,
    monitor: Monitor,
) -> Template:
    """The template in which the command has run: found, or made now.

    Args:
        prepared: with the template that it is made from.
        plan: of that template.

    Raises:
        GuestError: the command failed; says with what, and what it was refused.
        UserInputError: what it reads cannot be read, or changed meanwhile.
        RefusedError, HostError, ImageError: as for a session.
    """
    listing = _listing(asked, programs) if asked.project is not None else None
    mode = NetworkMode.NONE if asked.mode is NetworkMode.NONE else NetworkMode.PROXY
    session = asked.policy.session
    creation = Creation(prepared.template, session.post_create, _policy_meanwhile(asked.policy), mode, listing)
    maker = _Maker(host, asked, prepared, plan, layout, programs, monitor, creation)
    return find_or_make(creation.key, maker.store, monitor, maker.make)


def _policy_meanwhile(policy: Policy) -> Policy:
    """The network's rules; nothing of the host's variables, which are another person's in the next session."""
    # No decoys: they would be the same in all sessions.
    network = replace(policy.network, dlp_canaries=False)
    # As in a guest with a network (`guest_settings`): what pip fears to break, the worker cannot write.
    session = SessionPolicy(variables=(("PIP_BREAK_SYSTEM_PACKAGES", "1"), *policy.session.variables))
    return Policy(isolation=policy.isolation, network=network, session=session, source=policy.source)


def _selected(asked: SessionRequest, walk: Walk) -> Walk:
    return select_files(walk, asked.policy.session)


def _listing(asked: SessionRequest, programs: Programs) -> str:
    """The digest of what would be sent, from the same code that sends it."""
    assert asked.project is not None
    walk = _selected(asked, walk_project(asked.project, asked.policy, programs=programs))
    return pack(walk, lambda data: None).manifest.digest


@dataclass
class _Maker:
    host: Host
    asked: SessionRequest
    prepared: Prepared
    plan: TemplatePlan
    layout: Layout
    programs: Programs
    monitor: Monitor
    creation: Creation

    @property
    def store(self) -> TemplateStore:
        return TemplateStore(self.layout)

    def make(self) -> Template:
        began = time.monotonic()
        asked, creation = self.asked, self.creation
        request = SessionRequest(
            project=asked.project, name=f"create-{uuids.uuid4().hex[:8]}", policy=creation.policy,
            network=creation.mode, allow_emulation=asked.allow_emulation, ssh_ports=asked.ssh_ports,
            held=True,
        )  # fmt: skip
        prepared = replace(self.prepared, limits=NO_LIMITS)
        folder, info = claim(request, prepared, self.layout)
        sandbox = RunningSandbox(self.layout, folder, info, self.monitor)
        making = self.store.folder / f".making-{info.uuid}"
        title = f"making template {creation.key[:12]} (session.post_create: {shown_command(creation.command)[:60]!a})"
        try:
            with self.monitor.step(title), disk_errors("making the template's files"), self.store.making(making):
                write_opened(sandbox, request.policy)
                fork = partial(growing.start_grown, making=making)
                start_guest(sandbox, self.host, request, prepared, self.programs, fork)
                if asked.project is not None:
                    self._push(sandbox, asked.project)
                run_command(sandbox, creation.command, creation.mode is not NetworkMode.NONE)
                template = self._freeze(sandbox, making, began)
        except BaseException as error:
            sandbox.failed(error)
            raise
        finally:
            shutil.rmtree(making, ignore_errors=True)
        sandbox.close(f"became the template {template.key[:12]}")
        return template

    def _push(self, sandbox: RunningSandbox, project: Path) -> None:
        only = partial(_selected, self.asked)
        sandbox.info = push_project(sandbox, project, self.asked.policy, self.programs, only=only)
        if sha256_of(sandbox.folder.record_folder(sandbox.info.id) / "pushed.jsonl") != self.creation.listing:
            raise UserInputError(
                "the project changed while its template was begun", resolution="stop what writes to it, and try again"
            )

    def _freeze(self, sandbox: RunningSandbox, making: Path, began: float) -> Template:
        info, host = sandbox.info, self.host
        sandbox.disconnect()
        if sandbox.network_to_come is not None:
            sandbox.network_to_come.close()
        with closing(ControlPort(sandbox.folder.run / "control")) as port:
            port.connect(5)
            self.monitor.progress(0.7, 1, "taking its identity away, shrinking its memory")
            try:
                port.request("forget", deadline=FORGET_DEADLINE, shell=SHELL)
                port.request("settle", deadline=SETTLE_DEADLINE)
            except GuestError as error:
                error.brief = f"what session.post_create left cannot become a template: {error.brief}"
                raise
            host.suspend(info.uuid)
        freeze(host, info.uuid, making / STATE)
        host.destroy(info.uuid)
        facts = {**self.plan.facts, "post_create": list(self.creation.command), "record": info.id}
        return publish(self.store, making, self.creation.key, facts, time.monotonic() - began, self.creation.base)
