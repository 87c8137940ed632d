"""Gives a guest a git repository of its own, made on the host (`vmsandbox.git.giving`).

Without it an agent could not commit at all; with the host's own `.git` it would have other branches, remotes with
credentials in their URLs, and everything that was ever deleted. What comes back of it: `vmsandbox.session.commits`.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vmsandbox.errors import HostError, RefusedError, UserInputError
from vmsandbox.git.giving import SNAPSHOT_BYTES, GuestRepository, history, snapshot
from vmsandbox.policy.denied import DeniedPaths
from vmsandbox.policy.gitrepo import Repository, find_repository
from vmsandbox.policy.gitrun import HostGit
from vmsandbox.policy.values import Policy
from vmsandbox.process import Programs
from vmsandbox.review.manifest import Manifest, parse_untrusted_manifest
from vmsandbox.review.text import shown

if TYPE_CHECKING:
    from vmsandbox.session.sandbox import Sandbox

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


def give_history(
    sandbox: Sandbox, project: Path, mode: HistoryMode, policy: Policy, programs: Programs
) -> GivenRecord | None:
    """Put a repository beside the pushed files; call it after each push (which removes the one before).

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


def _send(sandbox: Sandbox, repository: GuestRepository, target: str) -> None:
    """Copy `.git` in, as an archive of the same kind as the project itself."""
    from vmsandbox.session.project import UNTAR, send_archive

    def fill(write: Callable[[bytes], None]) -> None:
        with tarfile.open(fileobj=_Writer(write), mode="w|", format=tarfile.GNU_FORMAT, bufsize=_PIECE) as tar:  # type: ignore[call-overload]
            for path, content in repository.small.items():
                tar.addfile(_member(path, len(content)), io.BytesIO(content))
            name = "objects/pack/" + repository.pack.name.replace("given", "pack")
            for ending in (".pack", ".idx"):
                with repository.pack.with_suffix(ending).open("rb") as file:
                    tar.addfile(_member(name + ending, os.fstat(file.fileno()).st_size), file)

    send_archive(sandbox, ["sh", "-c", f'rm -rf -- "$1/.git" && exec {UNTAR} -C "$1"', "sh", target], fill)


class _Writer:
    """A function as a file that tarfile can write to."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._write = write

    def write(self, data: bytes) -> int:
        self._write(data)
        return len(data)


def _member(path: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(f".git/{path}")
    member.size, member.mode, member.mtime = size, 0o644, int(time.time())
    return member


def given_record(record: Path) -> GivenRecord | None:
    """What the guest of this record was given, None for nothing. Raises HostError if that cannot be read."""
    try:
        values = json.loads((record / _RECORD).read_text())
        return GivenRecord(**{**values, "shallow": tuple(values["shallow"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise HostError("the record of the guest's repository cannot be read", details=str(error)) from error
