"""A guest has a repository of its own; its commits land below refs/vmsandbox, and its hooks and names nowhere."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Guest, make_tree

from vmsandbox.errors import GuestError, RefusedError
from vmsandbox.git.objects import PackWriter, TreeEntry, encode_tree
from vmsandbox.git.quarantine import PackLimits
from vmsandbox.policy.values import Policy
from vmsandbox.process import Programs
from vmsandbox.session.sandbox import Sandbox
from vmsandbox.session.transfer.commits import _receive, collect_commits
from vmsandbox.session.transfer.history import give_history


def git(root: Path, *words: str) -> str:
    return subprocess.run(
        ["git", "-c", "user.name=t", "-c", "user.email=t@t", *words],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()  # fmt: skip


def repository(root: Path, files: dict[str, bytes | str]) -> Path:
    make_tree(root, files)
    git(root, "init", "-q", "-b", "main")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "first")
    return root


def state_of(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def evil_pack(path: Path) -> tuple[bytes, str]:
    """A commit whose checkout would write `.git/config`; with its id."""
    with path.open("w+b") as file:
        writer = PackWriter(file, "sha1")
        inner = writer.add("tree", encode_tree([TreeEntry(0o100644, b"config", writer.add("blob", b"evil"))]))
        tree = writer.add("tree", encode_tree([TreeEntry(0o040000, b".git", inner)])).hex()
        person = "t <t@t> 1 +0000"
        tip = writer.add("commit", f"tree {tree}\nauthor {person}\ncommitter {person}\n\nm\n".encode())
        writer.finish()
    return path.read_bytes(), tip.hex()


def attached(guest: Guest) -> Sandbox:
    return Sandbox.attach(guest.name, layout=guest.cli.layout)


def test_commits_come_back_and_nothing_else_does(fork: Callable[..., Guest], tmp_path: Path) -> None:
    root = repository(tmp_path / "app", {"a.txt": "one\n", "run.sh": "#!/bin/sh\n", ".gitignore": "*.o\n"})
    (root / "run.sh").chmod(0o755)
    git(root, "commit", "-q", "-a", "-m", "second")
    git(root, "tag", "v1")
    (root / "a.txt").write_text("one, edited on the host\n")
    (root / ".git/hooks/reference-transaction").write_text(f"#!/bin/sh\ntouch {tmp_path}/sang\n")
    (root / ".git/hooks/reference-transaction").chmod(0o755)
    guest = fork(root)
    sandbox = attached(guest)
    try:
        given = give_history(sandbox, root, "full", Policy(), Programs())
        assert given is not None and given.base == git(root, "rev-parse", "HEAD")
        assert guest.sh("git log --format=%s; git status --short; git fsck --strict 2>&1") == "second\nfirst\n M a.txt"
        before = state_of(root)
        assert collect_commits(sandbox, root, Programs()).branches == ()

        guest.sh(
            """
            echo two > b.txt; git add -A; git commit -q -m 'by the agent'
            git branch feature/x; git branch -m main; git tag -f v1; git notes add -m note
            git replace HEAD HEAD~ ; git update-ref refs/heads/../evil HEAD 2>/dev/null
            git update-ref refs/remotes/origin/main HEAD; git branch 'odd;$(id)'
            for hook in post-checkout reference-transaction post-index-change; do
                printf '#!/bin/sh\\ntouch /tmp/hooked\\n' > .git/hooks/$hook 2>/dev/null || {
                mkdir -p .git/hooks; printf '#!/bin/sh\\ntouch /tmp/hooked\\n' > .git/hooks/$hook; }
                chmod +x .git/hooks/$hook
            done
            git config core.fsmonitor /tmp/evil; git config alias.x '!touch /tmp/hooked'
            true
            """
        )
        returned = collect_commits(sandbox, root, Programs())
    finally:
        sandbox.disconnect()
    assert {one.name for one in returned.branches} == {"main", "feature/x"}
    assert len(returned.skipped) == 1 and "odd" in returned.skipped[0]
    after = state_of(root)
    assert {name: after.get(name) for name in before} == before
    prefix = f"refs/vmsandbox/{guest.info.id}"
    new = {name for name in after if name not in before and "/objects/pack/pack-" not in name}
    assert new == {f".git/{prefix}/main", f".git/{prefix}/feature/x"}
    assert git(root, "log", "--format=%s", f"{prefix}/main") == "by the agent\nsecond\nfirst"
    assert git(root, "show", f"{prefix}/main:b.txt") == "two"
    git(root, "fsck", "--strict")
    assert not (tmp_path / "sang").exists(), "a hook of the project ran on the host"


def test_a_hostile_git_in_the_guest(fork: Callable[..., Guest], tmp_path: Path) -> None:
    """The guest decides what `git` is there: what answers may claim and send anything."""
    root = repository(tmp_path / "app", {"a.txt": "one\n"})
    git(root, "checkout", "-q", "-b", "private")
    (root / "diary").write_text("private")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "private")
    private = git(root, "rev-parse", "private")
    git(root, "checkout", "-q", "main")
    guest = fork(root)
    sandbox = attached(guest)
    try:
        give_history(sandbox, root, "full", Policy(), Programs())
        before = state_of(root)

        def hostile(script: str) -> None:
            install = 'printf "%s" "$1" > ~/bin/git; chmod +x ~/bin/git; echo "PATH=$HOME/bin:$PATH" > ~/.bashrc'
            guest.sh("mkdir -p ~/bin; " + install, "#!/bin/sh\n" + script)

        def answering(refs: str, pack: str) -> str:
            return f'case "$*" in *for-each-ref*) {refs};; *) {pack};; esac'

        evil, tip = evil_pack(tmp_path / "evil.pack")
        guest.run("sh", "-c", "cat > ~/evil.pack", stdin=evil)
        some = 'echo "$(printf %040d 1) refs/heads/x"'
        empty = b"PACK\0\0\0\2\0\0\0\0"
        empty_pack = "".join(f"\\{byte:03o}" for byte in empty + hashlib.sha1(empty).digest())
        cases = [
            (answering(f"echo {tip} refs/heads/main", "cat ~/evil.pack"), "index-pack"),
            (answering('yes "$(printf %040d 1) refs/heads/x"', "true"), "wrote more than"),
            (answering(some, "cat /dev/zero"), "larger than"),
            (answering(some, "echo rubbish"), "not a pack"),
            (answering(f"echo {private} refs/heads/x", f"printf '{empty_pack}'"), "nor was given"),
            (answering(some.replace("heads", "tags"), "true"), "malformed"),
        ]  # fmt: skip
        silent = answering(some, "sleep 60")
        for script, why, seconds in [*((*case, 20) for case in cases), (silent, "within", 3)]:
            hostile(script)
            with pytest.raises(GuestError, match=why):
                collect_commits(sandbox, root, Programs(), PackLimits(pack=4 << 20, seconds=seconds))
            assert state_of(root) == before, script
        # One that has ended before it had read what it was asked: more than an SSH window holds.
        hostile("printf 'all of it'")
        _receive(sandbox, ["0" * 40] * 80_000, tmp_path / "unread", PackLimits(seconds=60))
        assert (tmp_path / "unread").read_bytes() == b"all of it"
    finally:
        sandbox.disconnect()
    record = guest.folder.record_folder(guest.info.id)
    assert not list(record.glob("commits-*")), "something of the guest's was kept"


def test_without_history_a_guest_starts_with_one_commit(fork: Callable[..., Guest], tmp_path: Path) -> None:
    root = repository(tmp_path / "app", {"a.txt": "one\n", "id_rsa": "secret", "d/x": os.urandom(3000)})
    guest = fork(root)
    sandbox = attached(guest)
    try:
        for mode in ("full", "shallow"):
            with pytest.raises(RefusedError, match="id_rsa"):
                give_history(sandbox, root, mode, Policy(), Programs())  # type: ignore[arg-type]
        given = give_history(sandbox, root, "none", Policy(), Programs())
        assert given is not None and given.mode == "none"
        assert guest.sh("git log --format=%s; git status --short; git ls-files; git fsck --strict 2>&1") == (
            "As copied in\na.txt\nd/x"
        )
        guest.sh("echo more >> a.txt; git commit -q -a -m agent")
        returned = collect_commits(sandbox, root, Programs())
    finally:
        sandbox.disconnect()
    (branch,) = returned.branches
    assert git(root, "log", "--format=%s", branch.ref) == "agent\nAs copied in"
    git(root, "-c", "core.editor=true", "cherry-pick", branch.ref)
    assert (root / "a.txt").read_text() == "one\nmore\n"
