"""No repository makes the host run anything: each way that git offers is planted in a real one, and all that vmsandbox
does with a repository is done to it. Where plain git falls for it, that is shown too, so that the test can fail.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from git_repositories import PLAIN, commit, git, layout_in, make_repository, manifest_of, pack_of, text

from vmsandbox.errors import HostError, VmsandboxError
from vmsandbox.git.giving import history, snapshot
from vmsandbox.git.landing import land
from vmsandbox.git.quarantine import Given, PackLimits, quarantine
from vmsandbox.guest.walk import walk_project
from vmsandbox.policy.tree.denied import DeniedPaths
from vmsandbox.policy.tree.gitrepo import find_repository, tracked_files
from vmsandbox.policy.tree.gitrun import ENVIRONMENT, OVERRIDES, SUBCOMMANDS, HostGit
from vmsandbox.policy.values import Policy
from vmsandbox.process import Programs
from vmsandbox.session.records.backup import make_backup
from vmsandbox.session.records.restore import restore


class Lair:
    """A repository with a trap: `canary` is a program that leaves a mark when it is run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = make_repository(
            folder / "project", {"a": "1", "d/b": "2", ".gitattributes": "*.t filter=x diff=x\n", "f.t": "t"}
        )
        self.guest = folder / "guest"
        git(folder, "-c", "protocol.file.allow=always", "clone", "-q", self.root, self.guest)
        commit(self.guest, {"a": "by the agent"})
        self.canary = folder / "canary.sh"
        self.canary.write_text(f"#!/bin/sh\ntouch {folder}/sang\nexit 0\n")
        self.canary.chmod(0o755)
        (self.root / "a").write_text("changed, not committed")
        (self.root / "f.t").write_text("changed as well")

    def config(self, *pairs: str) -> None:
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            git(self.root, "config", "--add", key, value.replace("CANARY", str(self.canary)))

    def hooks(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        for name in ("reference-transaction", "post-checkout", "post-index-change", "pre-auto-gc", "post-update",
                     "update", "pre-receive", "post-receive", "proc-receive", "fsmonitor-watchman"):  # fmt: skip
            (folder / name).symlink_to(self.canary)

    @property
    def sang(self) -> bool:
        """Whether the canary was run since the last question."""
        mark = self.folder / "sang"
        found = mark.exists()
        mark.unlink(missing_ok=True)
        return found


def everything(lair: Lair, trouble_is_fine: bool = False) -> None:
    """All that vmsandbox does with a project's repository."""
    programs, root = Programs(), lair.root
    layout = layout_in(lair.folder / "home")
    record = layout.records / "20260101-000000-x-000000"
    repository = HostGit(programs, root / ".git")
    number = iter(range(100))

    def folder() -> Path:
        path = lair.folder / f"work-{next(number)}"
        path.mkdir()
        return path

    def take_back() -> None:
        base, tip = text(lair.guest, "rev-parse", "HEAD~"), text(lair.guest, "rev-parse", "HEAD")
        with quarantine(record, "sha1", PackLimits(), programs, Given(base, (), root / ".git/objects")) as held:
            held.pack.write_bytes(pack_of(lair.guest, tip, f"^{base}"))
            sound, _ = held.sound_pack([tip])
            land(repository, root / ".git", sound, record.name, {"main": tip})

    def give(shallow: bool) -> None:
        history(repository, root, manifest_of(root), DeniedPaths((), root), folder(), shallow=shallow)

    steps: list[Callable[[], object]] = [
        lambda: find_repository(root, programs), lambda: tracked_files(root, programs),
        lambda: walk_project(root, Policy(), programs=programs),
        lambda: make_backup(layout, record.name, root, programs), lambda: give(False), lambda: give(True),
        lambda: snapshot(root, manifest_of(root), "sha1", folder()), take_back,
        lambda: restore(record, lair.folder / "restored", programs),
    ]  # fmt: skip
    for step in steps:
        with suppress(*([VmsandboxError] if trouble_is_fine else [])):
            step()


class Trap(NamedTuple):
    """One way to have a program run. plain: a git command that falls for it; () if it does so only in a terminal."""

    plant: Callable[[Lair], None]
    plain: tuple[str, ...] = ()
    breaks: bool = False  # the repository is damaged by it, and steps may fail


def _config(*pairs: str) -> Callable[[Lair], None]:
    return lambda lair: lair.config(*pairs)


def _include(lair: Lair) -> None:
    (lair.folder / "included").write_text(f"[core]\n\tfsmonitor = {lair.canary}\n")
    lair.config("include.path", str(lair.folder / "included"))


def _include_if(lair: Lair) -> None:
    (lair.folder / "included").write_text(f"[core]\n\tfsmonitor = {lair.canary}\n")
    lair.config("includeIf.gitdir:**.path", str(lair.folder / "included"))


def _worktree_config(lair: Lair) -> None:
    lair.config("core.repositoryFormatVersion", "1", "extensions.worktreeConfig", "true")
    (lair.root / ".git/config.worktree").write_text(f"[core]\n\tfsmonitor = {lair.canary}\n")


def _hooks_path(lair: Lair) -> None:
    lair.hooks(lair.folder / "hooks")
    lair.config("core.hooksPath", str(lair.folder / "hooks"))


def _submodule(lair: Lair) -> None:
    inner = make_repository(lair.folder / "inner", {"x": "1"})
    git(lair.root, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", inner, "sub")
    git(lair.root, "commit", "-q", "-m", "sub")
    git(lair.root / "sub", "config", "core.fsmonitor", str(lair.canary))
    lair.config("submodule.recurse", "true")


def _partial_clone(lair: Lair) -> None:
    lair.config("core.repositoryFormatVersion", "1", "extensions.partialClone", "origin")
    lair.config("remote.origin.promisor", "true", "remote.origin.url", "ext::CANARY", "protocol.ext.allow", "always")
    blob = text(lair.root, "rev-parse", "HEAD:a")
    (lair.root / ".git/objects" / blob[:2] / blob[2:]).unlink()


def _alternate_refs(lair: Lair) -> None:
    other = make_repository(lair.folder / "other", {"x": "1"})
    (lair.root / ".git/objects/info/alternates").write_text(f"{other}/.git/objects\n")
    lair.config("core.alternateRefsCommand", "CANARY")


def _gc(lair: Lair) -> None:
    lair.hooks(lair.root / ".git/hooks")
    lair.config("gc.auto", "1", "gc.autoPackLimit", "1")


def _signed(lair: Lair) -> None:
    lair.config(
        "gpg.program", "CANARY", "gpg.openpgp.program", "CANARY", "commit.gpgSign", "true", "log.showSignature", "true"
    )


def _upload_pack(lair: Lair) -> None:
    lair.config(
        "remote.origin.url", str(lair.guest), "remote.origin.uploadpack", "CANARY", "protocol.file.allow", "always"
    )


TRAPS = {
    "fsmonitor": Trap(_config("core.fsmonitor", "CANARY"), ("status",)),
    "fsmonitor, included": Trap(_include, ("status",)),
    "fsmonitor, included conditionally": Trap(_include_if, ("status",)),
    "fsmonitor, config.worktree": Trap(_worktree_config, ("status",)),
    "fsmonitor of a submodule": Trap(_submodule, ("status",)),
    "hooks": Trap(lambda lair: lair.hooks(lair.root / ".git/hooks"), ("update-ref", "refs/x", "HEAD")),
    "hooksPath": Trap(_hooks_path, ("update-ref", "refs/x", "HEAD")),
    "filter.clean": Trap(_config("filter.x.clean", "CANARY", "filter.x.required", "true"), ("add", "f.t")),
    "filter.smudge": Trap(_config("filter.x.smudge", "CANARY"), ("checkout", "-f", "HEAD", "--", "f.t")),
    "filter.process": Trap(_config("filter.x.process", "CANARY"), ("add", "f.t")),
    "diff.external": Trap(_config("diff.external", "CANARY"), ("diff",)),
    "diff.X.command": Trap(_config("diff.x.command", "CANARY"), ("diff",)),
    "textconv": Trap(_config("diff.x.textconv", "CANARY"), ("diff",)),
    "alias": Trap(_config("alias.zz", "!CANARY", "alias.ls-tree", "!CANARY", "alias.rev-list", "!CANARY"), ("zz",)),
    "pager": Trap(_config("core.pager", "CANARY", "pager.ls-tree", "CANARY", "pager.for-each-ref", "true")),
    "editor": Trap(_config("core.editor", "CANARY", "sequence.editor", "CANARY"), ("commit", "--amend")),
    "signatures": Trap(_signed, ("commit", "--allow-empty", "-m", "x")),
    "ssh": Trap(_config("core.sshCommand", "CANARY", "remote.origin.url", "ssh://h/x"), ("fetch", "origin")),
    "git proxy": Trap(_config("core.gitProxy", "CANARY", "remote.origin.url", "git://h/x"), ("fetch", "origin")),
    "ext": Trap(_config("protocol.ext.allow", "always", "remote.origin.url", "ext::CANARY"), ("fetch", "origin")),
    "upload-pack": Trap(_upload_pack, ("fetch", "origin")),
    "credentials": Trap(_config("credential.helper", "!CANARY"), ("credential", "fill")),
    "askpass": Trap(_config("core.askPass", "CANARY"), ("credential", "fill")),
    "a partial clone's remote": Trap(_partial_clone, ("cat-file", "-p", "HEAD:a"), breaks=True),
    "alternate refs": Trap(_alternate_refs, ("rev-list", "--alternate-refs")),
    "pack objects hook": Trap(_config("uploadpack.packObjectsHook", "CANARY")),
    "gc": Trap(_gc),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAPS)
def test_nothing_that_a_repository_names_is_run(tmp_path: Path, name: str) -> None:
    trap = TRAPS[name]
    lair = Lair(tmp_path)
    trap.plant(lair)
    assert not lair.sang or name == "fsmonitor of a submodule"
    everything(lair, trap.breaks)
    assert not lair.sang, "the canary sang: a program that the repository names was run"
    if trap.plain:
        stdin = b"protocol=https\nhost=h\n\n" if "credential" in trap.plain else None
        subprocess.run(
            ["git", *trap.plain], cwd=lair.root, env={**PLAIN, "GIT_TERMINAL_PROMPT": "0"}, input=stdin or b"",
            capture_output=True, timeout=30, check=False,
        )  # fmt: skip
        assert lair.sang, "plain git does not fall for this either: the trap is badly set"


def test_nothing_of_the_persons_own_settings_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lair = Lair(tmp_path)
    home = tmp_path / "person"
    home.mkdir()
    (home / ".gitconfig").write_text(f"[core]\n\tfsmonitor = {lair.canary}\n\thooksPath = {tmp_path}/hooks\n")
    (home / "git").mkdir()
    (home / "git/config").write_text("[whoever reads this fails")
    lair.hooks(tmp_path / "hooks")
    trace = tmp_path / "trace"
    settings = {
        "HOME": str(home), "XDG_CONFIG_HOME": str(home), "GIT_TRACE": str(trace), "GIT_TRACE2": str(trace),
        "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "core.fsmonitor", "GIT_CONFIG_VALUE_0": str(lair.canary),
        "GIT_DIR": str(lair.guest / ".git"), "GIT_EXTERNAL_DIFF": str(lair.canary), "GIT_INDEX_FILE": "/dev/null",
        "GIT_OBJECT_DIRECTORY": str(lair.guest / ".git/objects"), "GIT_EXEC_PATH": str(tmp_path),
        "GIT_NAMESPACE": "n", "GIT_TEMPLATE_DIR": str(tmp_path), "GIT_PAGER": str(lair.canary),
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert "d/b" in tracked_files(lair.root, Programs())
    everything(lair)
    assert not lair.sang and not trace.exists()
    assert text(lair.root, "for-each-ref", "--format=%(refname)", "refs/vmsandbox/")
    plain = {"PATH": os.environ["PATH"], "HOME": str(home)}
    subprocess.run(["git", "-C", lair.root, "status"], env=plain, capture_output=True, check=False)
    assert lair.sang


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a repository to someone else")
def test_a_repository_of_another_user_works_and_runs_nothing(tmp_path: Path) -> None:
    lair = Lair(tmp_path)
    lair.hooks(lair.root / ".git/hooks")
    lair.config("core.fsmonitor", "CANARY")
    for folder, names, files in os.walk(lair.root):
        for name in (".", *names, *files):
            os.chown(Path(folder, name), 12345, 12345, follow_symlinks=False)
    assert "d/b" in tracked_files(lair.root, Programs())
    everything(lair)
    assert not lair.sang
    made = [path for path in (lair.root / ".git").rglob("*") if path.lstat().st_uid != 12345]
    assert made == [], "a person could not remove what root made in their repository"


def test_a_worktree_is_its_repository(tmp_path: Path) -> None:
    lair = Lair(tmp_path)
    lair.hooks(lair.root / ".git/hooks")
    git(lair.root, "-c", "core.hooksPath=/dev/null", "worktree", "add", "-q", tmp_path / "tree")
    found = find_repository(tmp_path / "tree", Programs())
    assert found is not None and found.git_dir is not None and found.common_dir is not None
    assert found.common_dir.resolve() == lair.root / ".git" and found.foreign_parts() == []
    layout = layout_in(tmp_path / "home")
    (tmp_path / "tree/new").write_text("n")
    make_backup(layout, "20260101-000000-x-000000", tmp_path / "tree", Programs())
    restore(layout.records / "20260101-000000-x-000000", tmp_path / "back")
    assert (tmp_path / "back/new").read_text() == "n" and (tmp_path / "back/a").read_text() == "1"
    assert text(tmp_path / "back", "symbolic-ref", "--short", "HEAD") == "tree"
    assert not lair.sang


def test_a_folder_that_looks_like_a_repository_is_none(tmp_path: Path) -> None:
    """CVE-2022-24765 and the like: files of a project that make it a bare repository with a configuration."""
    lair = Lair(tmp_path)
    bare = tmp_path / "bare"
    (lair.root / ".git").rename(bare)
    (bare / "work").mkdir()
    with (bare / "config").open("a") as file:
        file.write(f"[core]\n\tbare = false\n\tworktree = {bare}/work\n\tfsmonitor = {lair.canary}\n")
    assert find_repository(bare, Programs()) is None
    assert tracked_files(bare, Programs()) == frozenset()
    assert not lair.sang
    subprocess.run(["git", "status"], cwd=bare, env=PLAIN, capture_output=True, check=False)
    assert lair.sang


def test_only_commands_on_the_list_run() -> None:
    for words in (["status"], ["diff"], ["checkout"], ["fetch"], ["gc"], ["-c", "x=y"], ["zz"], ["clone"], ["archive"],
                  ["cat-file", "--textconv", "x"], ["cat-file", "--filters", "x"], ["read-tree", "-u", "HEAD"],
                  ["diff-tree", "--ext-diff"]):  # fmt: skip
        with pytest.raises(HostError, match="not run on the host"):
            HostGit(Programs()).run(*words)
    assert all(one.reason for one in (*ENVIRONMENT, *OVERRIDES)) and all(SUBCOMMANDS.values())


def test_git_is_run_in_one_place() -> None:
    package = Path(__file__).parents[2] / "vmsandbox"
    as_program = re.compile(r"""\["git"|"git", ?["*]""")
    naming = {path.name for path in package.rglob("*.py") if as_program.search(path.read_text())}
    assert naming == {"gitrun.py", "commits.py"}, "commits.py names the guest's git"
