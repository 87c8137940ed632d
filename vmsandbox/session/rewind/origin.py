"""A session that begins as a snapshot of another one: `start --from NAME:TAG`.

The policy, the image and the size are asked for as for any session, and have to be those that the snapshot was taken
under: otherwise a guest that was set up for a wide policy could be run, and reported, under a narrow one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from vmsandbox.errors import RefusedError, UserInputError
from vmsandbox.hypervisor.template import RAM
from vmsandbox.journal import events
from vmsandbox.paths import Layout
from vmsandbox.session.asked.request import Origin, Prepared
from vmsandbox.session.live.running import RunningSandbox
from vmsandbox.session.opening.made import made_of, unlike
from vmsandbox.session.rewind.recovery import finish_rollback
from vmsandbox.session.rewind.snapshots import copy_known, known_facts, snapshot_of
from vmsandbox.session.state.folder import SessionFolder
from vmsandbox.session.state.guestlock import guest_locked

if TYPE_CHECKING:
    from vmsandbox.process import Programs


@contextmanager
def standing_on(origin: Origin, prepared: Prepared, layout: Layout, programs: Programs) -> Iterator[Prepared]:
    """`prepared` with the origin's snapshot in the template's place; nobody removes the snapshot meanwhile.

    Raises:
        UserInputError: there is no such session or snapshot.
        RefusedError: it was taken under another policy, image or size.
        ImageError: it was changed.
    """
    folder = SessionFolder(layout, origin.name)
    folder.info()  # there is one
    if folder.is_between_guests:
        finish_rollback(folder)
    with guest_locked(folder, shared=True):
        info = folder.info()
        snapshot = snapshot_of(folder, info, origin.tag)
        differences = unlike(made_of(folder, programs).prepared, prepared)
        if differences:
            raise RefusedError(
                f"snapshot {origin.tag!r} of session {origin.name!r} was taken under something else than is asked for",
                details="\n".join(differences),
                resolution="name the same --policy as that session had",
            )
        yield replace(prepared, template=snapshot)


def adopt(sandbox: RunningSandbox, origin: Origin, prepared: Prepared) -> None:
    """Take over what the host knew of the guest's tree when the snapshot was taken."""
    source = SessionFolder(sandbox.layout, origin.name)
    info = sandbox.info
    kept = source.snapshots / prepared.template.folder.name / "host"
    copy_known(kept, sandbox.folder.record_folder(info.id), sandbox.folder.path / "baseline")
    sandbox.info = replace(info, **known_facts(source, prepared.template.folder.name))
    sandbox.folder.update(sandbox.info)
    sandbox.journal.append(
        events.ForkedFrom(
            source.info().id, prepared.template.folder.name, prepared.template.digests[RAM], sandbox.info.project
        )
    )


def origin_of(text: str) -> Origin:
    """`NAME:TAG`, or `NAME` for its start. Raises UserInputError."""
    name, _, tag = text.partition(":")
    if not name:
        raise UserInputError(f"not a session and its snapshot: {text!r}", resolution="--from NAME:TAG")
    return Origin(name, tag or None)
