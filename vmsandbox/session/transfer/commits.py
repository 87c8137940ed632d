"""Takes a guest's commits back: a pack through quarantine, refs below `refs/vmsandbox/SESSION/`.

Whatever the guest's side of this says is the guest's choice: its git, its configuration and its shell are. So the
names are matched against a narrow pattern, the pack has limits on bytes and time, and git on the host sees it only in
`vmsandbox.git.quarantine`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vmsandbox.errors import GuestError, HostError, RefusedError
from vmsandbox.git.landing import land
from vmsandbox.git.names import is_plain_branch
from vmsandbox.git.quarantine import Given, PackLimits, Submodule, quarantine
from vmsandbox.git.touching import TOO_MUCH, Denied, Touched
from vmsandbox.guest.streams import wait_readable
from vmsandbox.policy.tree.gitrepo import find_repository
from vmsandbox.policy.tree.gitrun import HostGit
from vmsandbox.process import Programs
from vmsandbox.review.returning import DeniedReturns
from vmsandbox.review.text import shown, shown_bytes
from vmsandbox.session.live.running import RunningSandbox
from vmsandbox.session.records.record import Record
from vmsandbox.session.transfer.history import given_record, object_format

_PIECE = 256 << 10
_REFS_BYTES = 256 << 10  # what the guest may say of its branches
_OID = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")


@dataclass(frozen=True)
class ReturnedBranch:
    """A branch of the guest's that is now on the host. commit: hexadecimal id."""

    name: str
    ref: str
    commit: str


@dataclass(frozen=True)
class ReturnedCommits:
    """What came back. skipped: branches that were not taken, and why, safe to show. submodules: to be warned of."""

    branches: tuple[ReturnedBranch, ...] = ()
    skipped: tuple[str, ...] = ()
    submodules: tuple[Submodule, ...] = ()

    def as_json(self) -> dict[str, object]:
        """For `--json` and the journal."""
        return asdict(self)


def collect_commits(
    sandbox: RunningSandbox, project: Path, programs: Programs, limits: PackLimits | None = None
) -> ReturnedCommits:
    """Take the guest's branches back, as `refs/vmsandbox/SESSION/BRANCH` of the project's repository.

    Branches that are where the guest's repository started are left out. The host's HEAD, index, work tree and every
    other ref stay as they are. A second call moves the session's own refs on.

    Raises:
        GuestError: what was sent is over a limit, malformed, incomplete or hostile. Nothing of it is kept.
        RefusedError: the project's `.git` leads into another repository.
        HostError: the host's repository cannot be written.
    """
    bounds = limits or PackLimits()
    record = sandbox.folder.record_folder(sandbox.info.id)
    given = given_record(record)
    if given is None or sandbox.info.guest_folder is None:
        return ReturnedCommits()
    tips, skipped = _untrusted_branches(sandbox, bounds)
    tips = {name: oid for name, oid in tips.items() if oid != given.base}
    if not tips:
        return ReturnedCommits(skipped=tuple(skipped))
    repository = find_repository(project.resolve(), programs)
    if repository is None or repository.git_dir is None or repository.common_dir is None:
        reason = "the project on the host is no git repository"
        return ReturnedCommits(skipped=(*skipped, *(f"{shown(name)}: {reason}" for name in tips)))
    if parts := repository.foreign_parts():
        raise RefusedError(
            "the project's git repository is not its own, so no commits are written to it",
            details="\n".join(shown(part, 300) for part in parts),
            resolution="the files themselves can be reviewed with `vmsandbox changes`",
        )
    git = HostGit(programs, repository.git_dir)
    if object_format(git) != given.algorithm:
        raise HostError("the repository's object format is not the one that the guest was given")
    known = None
    if given.mode != "none":
        known = Given(given.base, given.shallow, (repository.common_dir / "objects").resolve())
    with (
        sandbox.monitor.step("taking the guest's commits"),
        quarantine(record, given.algorithm, bounds, programs, known) as held,
    ):
        _receive(sandbox, [*tips.values(), *([f"^{given.base}"] if known else [])], held.pack, bounds)
        rules = DeniedReturns(Record(record).returns().denied_paths)
        pack, submodules = held.sound_pack(tips.values(), Denied(given.base, rules.rule) if rules else None)
        skipped += [f"{shown(name)}: {_why(held.left_out[oid])}" for name, oid in tips.items() if oid in held.left_out]
        tips = {name: oid for name, oid in tips.items() if oid not in held.left_out}
        if not tips:
            return ReturnedCommits(skipped=tuple(skipped))
        new = pack if pack.with_name(pack.name + ".pack").exists() else None
        refs = land(git, repository.common_dir, new, sandbox.info.id, tips)
    branches = tuple(ReturnedBranch(name, refs[name], oid) for name, oid in sorted(tips.items()))
    return ReturnedCommits(branches, tuple(skipped), tuple(submodules))


def _why(touched: Touched | None) -> str:
    if touched is None:
        return TOO_MUCH
    return (
        f"a commit touches {shown(touched.path, 200)}; the policy's return.denied_paths has {shown(touched.rule, 200)}"
    )


def _untrusted_branches(sandbox: RunningSandbox, limits: PackLimits) -> tuple[dict[str, str], list[str]]:
    """The guest's branches and their commits; and those whose names are not taken."""
    folder = sandbox.info.guest_folder
    assert folder is not None
    status, untrusted, untrusted_error = sandbox.shell().run(
        ["git", "-C", folder, "for-each-ref", f"--count={limits.branches + 1}",
         "--format=%(objectname) %(refname)", "refs/heads/"],
        limit=_REFS_BYTES,
    )  # fmt: skip
    if status != 0:
        return {}, [f"all branches: the guest's git says: {shown_bytes(untrusted_error.strip())}"]
    return parse_untrusted_branches(untrusted, limits.branches)


def parse_untrusted_branches(untrusted: bytes, most: int) -> tuple[dict[str, str], list[str]]:
    """Lines "object-id refs/heads/NAME" as (branch → commit, skipped and why).

    Raises:
        GuestError: a line is malformed, there are too many, or a branch is there twice.
    """
    rows = untrusted.split(b"\n")[:-1]
    if len(rows) > most:
        raise GuestError(f"the guest has more than {most} branches", resolution="delete some of them in the guest")
    tips: dict[str, str] = {}
    skipped: list[str] = []
    for untrusted_row in rows:
        oid, _, ref = untrusted_row.decode("utf-8", "surrogateescape").partition(" ")
        if not _OID.fullmatch(oid) or not ref.startswith("refs/heads/"):
            raise GuestError("the guest's list of branches is malformed", details=shown_bytes(untrusted_row))
        name = ref.removeprefix("refs/heads/")
        if not is_plain_branch(name):
            skipped.append(f"{shown(name, 200)}: not a name that is taken (letters, digits, '.', '_', '+', '-', '/')")
        elif name in tips:
            raise GuestError("the guest names a branch twice", details=shown(name, 200))
        else:
            tips[name] = oid
    return tips, skipped


def _receive(sandbox: RunningSandbox, revisions: Sequence[str], target: Path, limits: PackLimits) -> None:
    """Stream a pack from the guest into a file; the limits hold whatever the guest does."""
    folder = sandbox.info.guest_folder
    assert folder is not None
    channel = sandbox.shell().start(["git", "-C", folder, "pack-objects", "-q", "--revs", "--stdout"])
    try:
        with suppress(OSError):  # one that ends without having read it all: what it sent is judged the same
            channel.sendall("".join(f"{one}\n" for one in revisions).encode())
            channel.shutdown_write()
        with target.open("xb") as file:
            receive_untrusted(channel, file.write, limits)
    except OSError as error:
        raise GuestError("the guest's commits could not be received", details=str(error)[:500]) from error
    finally:
        channel.close()


def receive_untrusted(channel: Any, write: Callable[[bytes], object], limits: PackLimits) -> None:
    """Pass on what a channel sends until its command ends.

    Raises:
        GuestError: more than `limits.pack` bytes, longer than `limits.seconds`, or it failed.
    """
    until = time.monotonic() + limits.seconds
    total = 0
    untrusted_error = b""
    while True:
        idle = True
        if channel.recv_ready():
            untrusted = channel.recv(_PIECE)
            total += len(untrusted)
            if total > limits.pack:
                raise GuestError(f"the guest's commits are larger than {limits.pack >> 20} MiB")
            write(untrusted)
            idle = False
        if channel.recv_stderr_ready():
            untrusted_error = (untrusted_error + channel.recv_stderr(_PIECE))[-4000:]
            idle = False
        if time.monotonic() > until:
            raise GuestError(f"the guest did not send its commits within {limits.seconds} seconds")
        if idle:
            if channel.closed or (channel.eof_received and channel.exit_status_ready()):
                if not (channel.recv_ready() or channel.recv_stderr_ready()):
                    break
            else:
                wait_readable(channel, 0.1)
    if (status := channel.recv_exit_status()) != 0:
        raise GuestError(f"the guest's git failed with status {status}", details=shown_bytes(untrusted_error))
