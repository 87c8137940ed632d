"""Keeps what a project was before a session: `records/ID/backup/`, and brings it back.

A review can be wrong, and an accepted deletion is a deletion. What git has is kept as a bundle of all refs; what git
has not (changed and untracked files, also those that are withheld from guests, such as an `.env`) as a tar.
Ignored files are not kept: they can be made again, and may be gigabytes.

    backup/backup.json     what is what, with digests
    backup/all.bundle      `git bundle create --all`; the same file (a hard link) as long as no ref moves
    backup/shallow         commits without parents, of a shallow clone
    backup/work.tar        files that are not as in HEAD; of a project without git, all of them
    backup/work.jsonl      their manifest (vmsandbox.review.manifest)
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from vmsandbox.errors import HostError, UserInputError
from vmsandbox.guest.pack import pack
from vmsandbox.guest.walk import Limits, Walk
from vmsandbox.paths import Layout
from vmsandbox.policy.tree.gitrepo import Repository, find_repository
from vmsandbox.policy.tree.gitrun import HostGit
from vmsandbox.process import Programs
from vmsandbox.removal import put_aside
from vmsandbox.session.records.uncommitted import Base, uncommitted

FOLDER = "backup"
KEEP = 10
KEEP_BYTES = 10 << 30
_DETAILS = "backup.json"
_LIMITS = Limits(total_bytes=8 << 30, file_bytes=4 << 30)  # wider than a push's: what stays on the host is kept too


@dataclass(frozen=True)
class Backup:
    """What was kept of a project (`backup.json`).

    project: its folder. prefix: the folder's path inside its repository, "" for the top; None: there is no repository.
    head: HEAD's commit, None where there is none. head_ref: its branch, None when detached. refs: digest of all refs.
    bundle, work: SHA-256 of the files; bundle is None where there is no ref. deleted: in HEAD, but not in the folder.
    unreadable: what could not be read, and so is missing here.
    """

    project: str
    created: str
    prefix: str | None = None
    algorithm: str = "sha1"
    head: str | None = None
    head_ref: str | None = None
    refs: str | None = None
    bundle: str | None = None
    work: str = ""
    files: int = 0
    deleted: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()


def make_backup(layout: Layout, session_id: str, project: Path, programs: Programs) -> Backup:
    """Keep what a project is now, in the session's record. Writes nothing into the project; may run in a thread.

    Raises:
        UserInputError: the project changes while it is read, or has more than 8 GiB that no commit has.
        HostError: there is no room, or git failed.
    """
    root = project.resolve()
    record = layout.records / session_id
    folder = record / FOLDER
    staged = record / f".{FOLDER}"
    try:
        record.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(mode=0o700)
        backup = _fill(layout, staged, root, programs)
        _write(staged / _DETAILS, json.dumps(asdict(backup), indent=1).encode())
        staged.rename(folder)
    except OSError as error:
        raise HostError(
            "the project could not be backed up", details=str(error), resolution="`vmsandbox gc` gives space back"
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return backup


def keep_project(layout: Layout, session_id: str, project: Path, programs: Programs) -> Backup:
    """Back a project up, and remove backups that are too old or too many. Raises what `make_backup` does."""
    backup = make_backup(layout, session_id, project, programs)
    prune(layout)
    return backup


def read_backup(record: Path) -> Backup:
    """The description of a record's backup. Raises UserInputError if it has none, HostError if it is damaged."""
    try:
        values = json.loads((record / FOLDER / _DETAILS).read_bytes())
        for name in ("deleted", "unreadable"):
            values[name] = tuple(values[name])
        return Backup(**values)
    except FileNotFoundError:
        raise UserInputError(
            "this session has no backup",
            details=str(record),
            resolution="the newest backups of each project are kept; older ones are removed",
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise HostError("the backup's description cannot be read", details=f"{record}: {error}") from error


def prune(layout: Layout, keep: int = KEEP, most_bytes: int = KEEP_BYTES) -> list[Path]:
    """Remove old backups: all but the newest `keep` of each project, then the oldest until all together have at most
    `most_bytes` (what is linked twice counts once). The newest of each project stays. Returns what was removed.
    """
    by_project: dict[str, list[Path]] = {}
    for record in _records(layout):
        with suppress(UserInputError, HostError):
            by_project.setdefault(read_backup(record).project, []).append(record / FOLDER)
    much = [folder for kept in by_project.values() for folder in kept[keep:]]
    left = sorted(folder for kept in by_project.values() for folder in kept[1:keep])
    newest = [kept[0] for kept in by_project.values()]
    while left and _size([*left, *newest]) > most_bytes:
        much.append(left.pop(0))
    removed = []
    for folder in much:
        with suppress(OSError):
            shutil.rmtree(put_aside(folder))
            removed.append(folder)
    return removed


def sha256_of(path: Path) -> str:
    """A file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fill(layout: Layout, folder: Path, root: Path, programs: Programs) -> Backup:
    created = datetime.now(UTC).isoformat(timespec="seconds")
    repository = find_repository(root, programs) if programs.find("git") else None
    known = Backup(os.fspath(root), created)
    base = Base()
    if repository is not None and repository.git_dir is not None:
        known = _keep_refs(layout, folder, known, root, repository, programs)
        base = Base.read(HostGit(programs, repository.git_dir), known.head, known.prefix or "", known.algorithm)
    work = uncommitted(root, base, repository, programs)
    walk = Walk(root, _LIMITS, work.entries, [], sum(entry.size for entry in work.entries))
    with (folder / "work.tar").open("xb") as file:
        os.fchmod(file.fileno(), 0o600)
        digest = hashlib.sha256()

        def write(data: bytes) -> None:
            digest.update(data)
            file.write(data)

        packed = pack(walk, write)
    _write(folder / "work.jsonl", b"".join(packed.manifest.lines()))
    return Backup(
        **{**asdict(known), "work": digest.hexdigest(), "files": packed.files,
           "deleted": work.deleted, "unreadable": work.unreadable}
    )  # fmt: skip


def _keep_refs(
    layout: Layout, folder: Path, known: Backup, root: Path, repository: Repository, programs: Programs
) -> Backup:
    assert repository.git_dir is not None
    git = HostGit(programs, repository.git_dir)
    found = git.run("rev-parse", "--verify", "--quiet", "HEAD^{commit}", check=False)
    head = found.text.strip() if found.status == 0 else None
    head_ref = git.run("symbolic-ref", "--quiet", "HEAD", check=False).text.strip() or None
    listing = git.run("for-each-ref", "--format=%(objectname) %(refname)").stdout
    shallow = "".join(f"{one}\n" for one in sorted(repository.shallow)).encode()
    if shallow:
        _write(folder / "shallow", shallow)
    refs = hashlib.sha256(f"{head}\n{head_ref}\n".encode() + listing + b"\n" + shallow).hexdigest()
    bundle = None
    if listing or head:
        bundle = _link_earlier(layout, folder, known.project, refs) or _bundle(git, folder)
    prefix = "" if root == repository.top else os.fspath(root.relative_to(repository.top))
    return Backup(
        known.project, known.created, prefix, git.text("rev-parse", "--show-object-format"),
        head, head_ref, refs, bundle,
    )  # fmt: skip


def _bundle(git: HostGit, folder: Path) -> str:
    # window=0: what is already packed is copied as it is, and nobody waits for better deltas of the rest.
    path = folder / "all.bundle"
    git.run("bundle", "create", "-q", path, "--all", "HEAD", timeout=1800, config=[("pack.window", "0")])
    path.chmod(0o600)
    return sha256_of(path)


def _link_earlier(layout: Layout, folder: Path, project: str, refs: str) -> str | None:
    """The newest earlier bundle of the same refs, linked here; its digest."""
    for record in _records(layout):
        with suppress(UserInputError, HostError, OSError):
            earlier = read_backup(record)
            if earlier.project == project:
                if earlier.refs == refs and earlier.bundle is not None:
                    os.link(record / FOLDER / "all.bundle", folder / "all.bundle")
                    return earlier.bundle
                return None
    return None


def _records(layout: Layout) -> list[Path]:
    """Records that have a backup, the newest first (their names sort by time)."""
    return sorted((path.parent.parent for path in layout.records.glob(f"*/{FOLDER}/{_DETAILS}")), reverse=True)


def _size(folders: list[Path]) -> int:
    """Bytes on disk; a file that is linked into several folders counts once."""
    files = {}
    for folder in folders:
        for path in folder.iterdir():
            with suppress(OSError):
                status = path.stat()
                files[status.st_ino] = status.st_size
    return sum(files.values())


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(content)
