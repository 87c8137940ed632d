"""What a project was before a session comes back as it was; what it costs is bounded; nothing of it is run."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
from git_repositories import commit, git, layout_in, make_repository, state_of, text

from vmsandbox.errors import HostError, UserInputError
from vmsandbox.paths import Layout
from vmsandbox.process import Programs
from vmsandbox.session.records.backup import Backup, make_backup, prune, read_backup
from vmsandbox.session.records.restore import restore

ID = "2026010{}-000000-x-000000"


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return layout_in(tmp_path / "home")


def back_up(layout: Layout, project: Path, number: int = 1) -> tuple[Backup, Path]:
    name = ID.format(number)
    return make_backup(layout, name, project, Programs()), layout.records / name


def tree(root: Path) -> dict[str, object]:
    """All but `.git`: content, links' targets, modes."""
    found: dict[str, object] = {}
    for path in root.rglob("*"):
        name = str(path.relative_to(root))
        if name.split("/")[0] == ".git":
            continue
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = (path.stat().st_mode & 0o777, path.read_bytes())
        else:
            found[name] = path.stat().st_mode & 0o777
    return found


def busy_project(root: Path) -> Path:
    make_repository(
        root,
        {"same": "1", "edited": "1", "gone": "1", "d/gone-too": "1", "was-file": "1", "was-dir/x": "1", "chmod": "1",
         ".gitignore": "ignored/\n*.log\n", "kept.log": "tracked although ignored", "crlf.txt": "a\r\n"},
    )  # fmt: skip
    (root / "link").symlink_to("same")
    (root / "-n\ne\udcffw".encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")).write_text("odd name")
    commit(root, {})
    git(root, "branch", "other")
    git(root, "tag", "v1")
    (root / "edited").write_text("2")
    (root / "gone").unlink()
    (root / "d/gone-too").unlink()
    (root / "d").rmdir()
    (root / "was-file").unlink()
    (root / "was-file").mkdir()
    (root / "was-file/now").write_text("x")
    (root / "was-dir/x").unlink()
    (root / "was-dir").rmdir()
    (root / "was-dir").symlink_to("edited")
    (root / "chmod").chmod(0o755)
    (root / "link").unlink()
    (root / "link").symlink_to("/etc/passwd")
    (root / ".env").write_text("PASSWORD=work of the person")
    (root / ".env").chmod(0o600)
    (root / "untracked/deep").mkdir(parents=True)
    (root / "untracked/deep/file").write_text("u")
    (root / "empty").mkdir(mode=0o700)
    (root / "kept.log").write_text("edited")
    (root / "staged").write_text("s")
    git(root, "add", "staged")
    (root / "ignored").mkdir()
    (root / "ignored/big.o").write_text("i")
    return root


def test_a_project_comes_back_with_its_uncommitted_work(layout: Layout, tmp_path: Path) -> None:
    root = busy_project(tmp_path / "project")
    before = state_of(root)
    backup, record = back_up(layout, root)
    assert state_of(root) == before, "a backup writes nothing into the project"
    assert set(backup.deleted) == {"gone", "d/gone-too", "was-file", "was-dir/x"} and backup.unreadable == ()
    assert (record / "backup").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (record / "backup").iterdir()} == {0o600}

    expected = {name: what for name, what in tree(root).items() if not name.startswith("ignored")}
    status = text(root, "status", "--porcelain")
    restored = restore(record, tmp_path / "back")
    back = tmp_path / "back"
    assert tree(back) == expected and restored.left_out == ()
    assert text(back, "for-each-ref") == text(root, "for-each-ref")
    assert text(back, "symbolic-ref", "HEAD") == "refs/heads/main"
    git(back, "fsck", "--strict")
    assert text(back, "status", "--porcelain") == status.replace("A  staged", "?? staged").replace(
        "?? staged\n", ""
    ).replace("?? untracked/", "?? staged\n?? untracked/")


def test_restoring_needs_a_new_or_empty_folder(layout: Layout, tmp_path: Path) -> None:
    root = make_repository(tmp_path / "project", {"a": "1"})
    _, record = back_up(layout, root)
    for target in (root, root / "a"):
        with pytest.raises(UserInputError, match="not an empty folder"):
            restore(record, target)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserInputError):
        restore(record, tmp_path / "link")
    (tmp_path / "empty").mkdir()
    restore(record, tmp_path / "empty")
    assert tree(tmp_path / "empty") == tree(root)
    with pytest.raises(UserInputError, match="no backup"):
        restore(layout.records / "no-such", tmp_path / "x")


@pytest.mark.parametrize("damage", ["work.tar", "all.bundle", "work.jsonl"])
def test_a_damaged_backup_is_found_and_leaves_nothing(layout: Layout, tmp_path: Path, damage: str) -> None:
    root = busy_project(tmp_path / "project")
    _, record = back_up(layout, root)
    path = record / "backup" / damage
    data = bytearray(path.read_bytes())
    if damage == "work.jsonl":
        data = bytearray(b"".join(line for line in data.splitlines(True) if b'".env"' not in line)).replace(
            b'{"entries":', b'{"entries":0'
        )
    else:
        data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(HostError, match="backup is damaged"):
        restore(record, tmp_path / "back")
    assert not (tmp_path / "back").exists() and not list(tmp_path.glob(".back*"))


def test_an_unchanged_repository_costs_no_second_bundle(layout: Layout, tmp_path: Path) -> None:
    root = make_repository(tmp_path / "project", {"a": "1"})
    bundles = []
    for number in (1, 2, 3):
        if number == 3:
            git(root, "tag", "moved")
        (root / "new").write_text(str(number))
        _, record = back_up(layout, root, number)
        bundles.append((record / "backup/all.bundle").stat().st_ino)
    assert bundles[0] == bundles[1] != bundles[2]
    git(root, "bundle", "verify", layout.records / ID.format(3) / "backup/all.bundle")
    other = make_repository(tmp_path / "other", {"a": "1"})
    _, record = back_up(layout, other, 4)
    assert (record / "backup/all.bundle").stat().st_nlink == 1
    _, record = back_up(layout, root, 5)
    assert (record / "backup/all.bundle").stat().st_ino == bundles[2], "another project's backup lies between"


@pytest.mark.parametrize("kind", ["no git", "unborn", "detached", "sha256", "shallow", "below"])
def test_all_sorts_of_projects(layout: Layout, tmp_path: Path, kind: str) -> None:
    root = tmp_path / "project"
    if kind == "no git":
        (root / "d").mkdir(parents=True)
        (root / "d/f").write_text("x")
        (root / "l").symlink_to("d/f")
    elif kind == "unborn":
        root.mkdir()
        git(root, "init", "-q", "-b", "main")
        (root / "f").write_text("x")
    elif kind == "shallow":
        source = commit(make_repository(tmp_path / "source", {"a": "1"}), {"a": "2"})
        git(tmp_path, "-c", "protocol.file.allow=always", "clone", "-q", "--depth=1", f"file://{source}", root)
    else:
        make_repository(root, {"a": "1", "sub/b": "2"}, *(["--object-format=sha256"] if kind == "sha256" else []))
        if kind == "detached":
            git(root, "checkout", "-q", "--detach")
            commit(root, {"a": "3"}, "on no branch")
    project = root / "sub" if kind == "below" else root
    (project / "work").write_text("w")
    backup, record = back_up(layout, project)
    back = tmp_path / "back"
    restore(record, back)
    assert tree(back) == tree(project)
    assert backup.prefix == {"no git": None, "below": "sub"}.get(kind, "")
    assert (back / ".git").exists() == (kind not in ("no git", "below", "unborn"))
    if (back / ".git").exists():
        git(back, "fsck")
        assert text(back, "rev-parse", "HEAD") == text(root, "rev-parse", "HEAD")
        assert text(back, "status", "--porcelain") == "?? work"


def test_a_submodules_files_and_a_nested_repository_are_kept(layout: Layout, tmp_path: Path) -> None:
    inner = make_repository(tmp_path / "inner", {"x": "1"})
    root = make_repository(tmp_path / "project", {"a": "1"})
    git(root, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", inner, "sub")
    commit(root, {})
    (root / "sub/x").write_text("edited in the submodule")
    make_repository(root / "nested", {"n": "1"})
    _, record = back_up(layout, root)
    restore(record, tmp_path / "back")
    assert (tmp_path / "back/sub/x").read_text() == "edited in the submodule"
    assert (tmp_path / "back/nested/n").read_text() == "1"


def test_a_committed_tree_cannot_write_outside_the_target(layout: Layout, tmp_path: Path) -> None:
    """A commit that somebody else made: a link and a file behind it, and git's own folder."""
    outside = tmp_path / "outside"
    outside.mkdir()
    root = make_repository(tmp_path / "project", {"a": "1"})
    blob = text(root, "hash-object", "-w", "--stdin", stdin=b"evil")
    link = text(root, "hash-object", "-w", "--stdin", stdin=str(outside).encode())

    def make(*entries: bytes) -> str:
        return text(root, "hash-object", "-t", "tree", "-w", "--literally", "--stdin", stdin=b"".join(entries))

    def entry(mode: str, name: str, oid: str) -> bytes:
        return f"{mode} {name}\0".encode() + bytes.fromhex(oid)

    file = make(entry("100644", "f", blob))
    evil = make(entry("40000", ".git", file), entry("40000", "..", file), entry("120000", "d", link),
                entry("40000", "d", file), entry("100644", "good", blob))  # fmt: skip
    git(root, "update-ref", "HEAD", text(root, "commit-tree", "-m", "evil", evil))
    for name in (".git/index", "a"):
        (root / name).unlink()
    (root / "good").write_text("evil")
    backup, record = back_up(layout, root)
    assert backup.head == text(root, "rev-parse", "HEAD")
    details = record / "backup/backup.json"
    details.write_text(json.dumps({**json.loads(details.read_text()), "deleted": []}))
    with pytest.raises(HostError):  # `d` cannot be both; nothing is left
        restore(record, tmp_path / "back")
    assert list(outside.iterdir()) == [] and not (tmp_path / "f").exists() and not (tmp_path / "back").exists()
    details.write_text(json.dumps({**json.loads(details.read_text()), "deleted": ["d"]}))
    restored = restore(record, tmp_path / "back2")
    assert set(restored.left_out) == {".git/f", "../f"}
    assert not (tmp_path / "back2/.git/f").exists() and not (tmp_path / "f").exists()


def test_old_backups_go_and_the_newest_of_each_project_stays(layout: Layout, tmp_path: Path) -> None:
    one = make_repository(tmp_path / "one", {"a": os.urandom(50_000).hex()})
    two = make_repository(tmp_path / "two", {"a": "2"})
    for number in range(1, 7):
        (one / "big").write_bytes(os.urandom(100_000))
        back_up(layout, one, number)
        assert (layout.records / ID.format(number) / "backup").is_dir()
    back_up(layout, two, 7)
    (layout.records / "20250101-000000-no-backup-0").mkdir()

    def left() -> list[int]:
        return [number for number in range(1, 8) if (layout.records / ID.format(number) / "backup").exists()]

    assert [path.parent.name for path in prune(layout, keep=4)] == [ID.format(2), ID.format(1)]
    assert left() == [3, 4, 5, 6, 7]
    prune(layout, keep=4, most_bytes=450_000)  # four tars of 100 KB, one bundle of 60 KB that counts once
    assert left() == [4, 5, 6, 7]
    prune(layout, keep=4, most_bytes=0)
    assert left() == [6, 7]
    assert (layout.records / ID.format(1)).is_dir(), "a record stays"
    restore(layout.records / ID.format(6), tmp_path / "back")
    assert tree(tmp_path / "back") == tree(one)


def test_what_is_in_the_way_or_goes_away(layout: Layout, tmp_path: Path) -> None:
    root = make_repository(tmp_path / "project", {"a": "1"})
    os.mkfifo(root / "pipe")
    backup, record = back_up(layout, root)
    assert backup.files == 0
    before = state_of(record)
    with pytest.raises(HostError):  # a session has one backup: a second one does not replace it
        back_up(layout, root)
    assert state_of(record) == before and not (record / ".backup").exists()
    assert read_backup(record) == backup


def test_several_at_once(layout: Layout, tmp_path: Path) -> None:
    root = busy_project(tmp_path / "project")
    done: list[Backup] = []
    threads = [threading.Thread(target=lambda n=n: done.append(back_up(layout, root, n)[0])) for n in range(1, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(done) == 5 and len({one.refs for one in done}) == 1
    restore(layout.records / ID.format(3), tmp_path / "back")
