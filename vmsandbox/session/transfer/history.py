"""Gives a guest a git repository of its own, made on the host (`vmsandbox.git.giving`).

Without it an agent could not commit at all; with the host's own `.git` it would have other branches, remotes with
credentials in their URLs, and everything that was ever deleted. What comes back of it: `transfer.commits`.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from vmsandbox.errors import HostError, RefusedError, UserInputError
from vmsandbox.failpoints import failpoint
from vmsandbox.git.giving import SNAPSHOT_BYTES, GuestRepository, Snapshot, history, snapshot
from vmsandbox.guest.pack import Files, pack_files
from vmsandbox.policy.tree.denied import DeniedPaths
from vmsandbox.policy.tree.gitrepo import Repository, find_repository
from vmsandbox.policy.tree.gitrun import HostGit
from vmsandbox.policy.values import Policy
from vmsandbox.process import Programs
from vmsandbox.review.manifest import Manifest, parse_untrusted_manifest
from vmsandbox.review.text import shown
from vmsandbox.session.live.running import RunningSandbox

HistoryMode = Literal["none", "shallow", "full"]
_RECORD = "history.json"
_PIECE = 256 << 10


@dataclass(frozen=True)
class GivenRecord:
    """What a guest's repository was started from (`records/ID/history.json`). shallow: see GuestRepository."""

    mode: HistoryMode
    base: str
    branch: str
    algorithm: str
    shallow: tuple[str, ...] = ()


class SnapshotOnTheWay:
    """The guest's repository, made of the files as they are sent (`guest.pack.Companion`), and sent after them."""

    def __init__(self, algorithm: str, folder: Path) -> None:
        self._snapshot = Snapshot(algorithm, folder)
        self._made: GuestRepository | None = None
        self.add = self._snapshot.add
        self.close = self._snapshot.close

    def send(self, write: Callable[[bytes], object]) -> None:
        """Send `.git`, as an archive of its own."""
        self._made = self._snapshot.finish()
        pack_files(_members(self._made), write)

    def given(self, record: Path) -> None:
        """The guest has it: write that down."""
        assert self._made is not None
        _given(record, "none", self._made)


@contextmanager
def snapshot_on_the_way(
    project: Path, size: int, programs: Programs, record: Path, mode: HistoryMode
) -> Iterator[SnapshotOnTheWay | None]:
    """What makes the guest's repository while a project is sent; None where that is left to `give_history`.

    Args:
        size: bytes of the project's files. record: the session's; what was given before is forgotten.
    """
    (record / _RECORD).unlink(missing_ok=True)
    if mode != "none" or size > SNAPSHOT_BYTES or programs.find("git") is None:
        yield None
        return
    repository = find_repository(project.resolve(), programs)
    algorithm = "sha1"
    if repository is not None and repository.git_dir is not None:
        algorithm = object_format(HostGit(programs, repository.git_dir))
    with (
        tempfile.TemporaryDirectory(prefix="history-", dir=record) as folder,
        closing(SnapshotOnTheWay(algorithm, Path(folder))) as made,
    ):
        yield made


def give_history(
    sandbox: RunningSandbox, project: Path, mode: HistoryMode, policy: Policy, programs: Programs
) -> GivenRecord | None:
    """Put a repository beside the pushed files, unless one came with them; call it after each push.

    Returns:
        What it starts from; None where the guest gets none: its project is too large for a snapshot, or git is missing.

    Raises:
        RefusedError: the history has something that the policy denies, or the repository is not the project's own.
        UserInputError: the project has changed since it was pushed, or is not the top of its repository.
        GuestError: the guest did not take it.
    """
    info = sandbox.info
    if info.guest_folder is None:
        raise UserInputError("nothing was copied in yet, so there is nothing to make a repository of")
    record = sandbox.folder.record_folder(info.id)
    if mode == "none" and (given := given_record(record)) is not None and given.mode == "none":
        return given
    (record / _RECORD).unlink(missing_ok=True)
    pushed = parse_untrusted_manifest([(record / "pushed.jsonl").read_bytes()])
    with (
        sandbox.monitor.step("making the guest's repository"),
        tempfile.TemporaryDirectory(prefix="history-", dir=record) as folder,
    ):
        made = _make(project.resolve(), mode, policy, pushed, programs, Path(folder))
        if isinstance(made, str):
            sandbox.monitor.notice(f"the guest gets no git repository: {made}")
            return None
        repository, mode = made
        _send(sandbox, repository, info.guest_folder)
        failpoint("push.history")
    return _given(record, mode, repository)


def _given(record: Path, mode: HistoryMode, repository: GuestRepository) -> GivenRecord:
    given = GivenRecord(mode, repository.base, repository.branch, repository.algorithm, repository.shallow)
    (record / _RECORD).write_text(json.dumps(asdict(given)))
    return given


def _make(
    root: Path, mode: HistoryMode, policy: Policy, pushed: Manifest, programs: Programs, folder: Path
) -> tuple[GuestRepository, HistoryMode] | str:
    """The guest's repository and the mode that it really has; or why there is none."""
    if programs.find("git") is None:
        return "git is not installed on the host"
    repository = find_repository(root, programs)
    algorithm = "sha1"
    if repository is not None and repository.git_dir is not None:
        git = HostGit(programs, repository.git_dir)
        algorithm = object_format(git)
        if mode != "none":
            _check_source(root, repository)
            made = history(
                git, root, pushed, DeniedPaths(policy.filesystem.denied_paths, root), folder,
                shallow=mode == "shallow", own_shallow=repository.shallow,
            )  # fmt: skip
            if made is not None:
                return made, mode
    elif mode != "none":
        raise UserInputError(
            "the project has no git repository whose history could be given",
            details=str(root),
            resolution="use --history none: the guest starts with one commit of what is copied in",
        )
    size = sum(item.size for item in pushed.items.values())
    if size > SNAPSHOT_BYTES:
        return f"{size >> 20} MiB would have to be sent a second time (`git init` there makes one)"
    return snapshot(root, pushed, algorithm, folder), "none"


def _check_source(root: Path, repository: Repository) -> None:
    """Refuse to give out a history that is not the project's own."""
    if repository.top != root:
        raise UserInputError(
            "the project is a folder inside a git repository; its history has what is outside of it",
            details=f"the repository's top is {repository.top}",
            resolution="name the repository's top as project, or use --history none",
        )
    if parts := repository.foreign_parts() + repository.borrowed_objects():
        raise RefusedError(
            "the project's git repository is not its own, so its history is not given to the guest",
            details="\n".join(shown(part, 300) for part in parts),
            resolution="use --history none",
        )


def object_format(git: HostGit) -> str:
    """`sha1` or `sha256`: what the repository names its objects by."""
    found = git.run("rev-parse", "--show-object-format", check=False)
    return "sha256" if found.status == 0 and found.text.strip() == "sha256" else "sha1"


def _send(sandbox: RunningSandbox, repository: GuestRepository, target: str) -> None:
    """Copy `.git` in, as an archive of the same kind as the project itself."""
    from vmsandbox.session.transfer.archive import PORT, UNTAR, send_archive

    def fill(write: Callable[[bytes], None]) -> None:
        pack_files(_members(repository), write)

    send_archive(sandbox, ["sh", "-c", f'rm -rf -- "$1/.git" && exec {UNTAR} -C "$1" <{PORT}', "sh", target], fill)


def _members(repository: GuestRepository) -> Files:
    """The files of the folder `.git`: path, size, content."""
    for path, content in repository.small.items():
        yield f".git/{path}", len(content), (content,)
    name = ".git/objects/pack/" + repository.pack.name.replace("given", "pack")
    for ending in (".pack", ".idx"):
        with repository.pack.with_suffix(ending).open("rb") as file:
            yield name + ending, os.fstat(file.fileno()).st_size, iter(lambda file=file: file.read(_PIECE), b"")  # type: ignore[misc]


def given_record(record: Path) -> GivenRecord | None:
    """What the guest of this record was given, None for nothing. Raises HostError if that cannot be read."""
    try:
        values = json.loads((record / _RECORD).read_text())
        return GivenRecord(**{**values, "shallow": tuple(values["shallow"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise HostError("the record of the guest's repository cannot be read", details=str(error)) from error
