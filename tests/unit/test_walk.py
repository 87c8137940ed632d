"""What goes into a guest and what stays: on the real file system, with the real git as the judge."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmsandbox.errors import RefusedError, UserInputError
from vmsandbox.guest.walk import Limits, Reason, Walk, walk_project
from vmsandbox.policy.values import FilesystemPolicy, Policy
from vmsandbox.process import Programs

GIT = {
    "PATH": os.environ["PATH"],
    "HOME": "/nonexistent",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
}


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-c", "protocol.file.allow=always", *arguments],
        cwd=folder, env=GIT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip


def write(root: Path, **files: str) -> None:
    """Write files; the keys are paths."""
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


def sent(walk: Walk) -> set[str]:
    return {entry.path for entry in walk.entries if entry.kind != "dir"}


def kept(walk: Walk) -> dict[str, Reason]:
    return {row.path: row.reason for row in walk.withheld}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    root.mkdir()
    return root


def test_secrets_links_out_and_special_files_stay_and_are_listed(project: Path, tmp_path: Path) -> None:
    secret = tmp_path / "home/.ssh"
    secret.mkdir(parents=True)
    (secret / "id_rsa").write_text("PRIVATE")
    write(project, **{"src/a.py": "a", ".env": "TOKEN", ".env.example": "TOKEN=", "deep/server.key": "K"})
    (project / "ssh").symlink_to(secret)  # absolute
    (project / "up").symlink_to("../home/.ssh/id_rsa")
    (project / "there-and-back").symlink_to("../project/src/a.py")
    (project / "src/inside").symlink_to("../src/a.py")
    (project / "through").symlink_to("ssh/id_rsa")  # a link inside that goes on through one that leaves
    (project / "dangling").symlink_to("not/there")
    (project / "loop").symlink_to("loop")
    os.mkfifo(project / "fifo")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(project / "socket"))
    begin = time.monotonic()
    walk = walk_project(project, Policy())
    listener.close()
    assert time.monotonic() - begin < 5
    assert sent(walk) == {"src/a.py", ".env.example", "src/inside", "dangling", "loop"}
    assert kept(walk) == {
        "ssh": Reason.LINK, "up": Reason.LINK, "there-and-back": Reason.LINK, "through": Reason.LINK,
        "fifo": Reason.SPECIAL, "socket": Reason.SPECIAL, ".env": Reason.SECRET,
        "deep/server.key": Reason.SECRET,
    }  # fmt: skip
    assert {row.detail for row in walk.withheld if row.reason is Reason.SPECIAL} == {"FIFO", "socket"}
    assert walk.counts[Reason.LINK] == 4


def test_a_link_through_a_linked_folder_is_judged_by_where_it_really_leads(project: Path) -> None:
    write(project, **{"a/b/c/file": ""})
    (project / "d").symlink_to("a/b/c")
    (project / "in").symlink_to("d/../../x")  # by its text ../x, in truth a/x
    (project / "a/out").symlink_to("../d/../../../../x")
    assert kept(walk_project(project, Policy())) == {"a/out": Reason.LINK}


def test_entries_carry_mode_size_time_and_target(project: Path) -> None:
    write(project, **{"run.sh": "12345"})
    (project / "run.sh").chmod(0o4750)
    os.utime(project / "run.sh", (1, 1_000_000))
    (project / "link").symlink_to("run.sh")
    (project / "empty").mkdir(mode=0o711)
    by_path = {entry.path: entry for entry in walk_project(project, Policy()).entries}
    assert by_path["run.sh"] == ("run.sh", "file", 0o750, 5, 1_000_000, None)
    assert by_path["link"].target == "run.sh" and by_path["link"].kind == "symlink"
    assert by_path["empty"].kind == "dir" and by_path["empty"].mode == 0o711


def test_names_are_data(project: Path) -> None:
    names = [
        b"new\nline",
        b"\"quote'",
        b"$(id)",
        b"-oProxyCommand=x",
        b"\xff\xfe",
        b"\x1b]52;c;x\x07",
        b"back\\slash",
        b" ",
    ]
    for name in names:
        (project / os.fsdecode(name)).write_text("x")
    assert sent(walk_project(project, Policy())) == {os.fsdecode(name) for name in names}


def test_a_folder_comes_before_what_is_in_it(project: Path) -> None:
    write(project, **{"a/b/c.txt": "", "a-b/x": "", "a.b": ""})
    seen: set[str] = set()
    for entry in walk_project(project, Policy()).entries:
        parent = entry.path.rpartition("/")[0]
        assert not parent or parent in seen
        seen.add(entry.path)


def test_git_folders_stay_at_any_depth_whether_folder_or_file(project: Path) -> None:
    git(project, "init", "-q")
    write(project, **{"sub/.git": "gitdir: elsewhere", "other/.git/config": "x", "a": ""})
    walk = walk_project(project, Policy())
    assert sent(walk) == {"a"}
    assert kept(walk) == {".git": Reason.GIT, "sub/.git": Reason.GIT, "other/.git": Reason.GIT}


def test_ignored_folders_are_one_row_and_not_entered(project: Path) -> None:
    write(project, **{".gitignore": "node_modules/\n*.log\n", "node_modules/x/y.js": "", "a.log": "", "b": ""})
    (project / "node_modules/closed").mkdir(mode=0)
    walk = walk_project(project, Policy())
    assert sent(walk) == {".gitignore", "b"}
    assert [row for row in walk.withheld if row.folder] == [("node_modules", Reason.IGNORED, True, "")]
    assert walk.counts == {Reason.IGNORED: 2}


def test_a_tracked_file_is_sent_although_ignored_but_not_when_secret_or_denied(project: Path) -> None:
    git(project, "init", "-q")
    write(project, **{
        ".gitignore": "build/\n*.gen\n", "build/keep/tracked.c": "", "build/keep/other.o": "",
        "build/x/y": "",
        "a.gen": "", "b.gen": "", ".env": "", "private/p": "",
    })  # fmt: skip
    git(project, "add", "-f", "build/keep/tracked.c", "a.gen", ".env", "private/p")
    walk = walk_project(project, Policy(filesystem=FilesystemPolicy(denied_paths=("./private/",))))
    assert sent(walk) == {".gitignore", "build/keep/tracked.c", "a.gen"}
    assert kept(walk) == {
        ".git": Reason.GIT, ".env": Reason.SECRET, "private": Reason.POLICY, "b.gen": Reason.IGNORED,
        "build/keep/other.o": Reason.IGNORED, "build/x": Reason.IGNORED,
    }  # fmt: skip


def test_a_project_inside_a_repository_obeys_the_rules_above_it(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    write(tmp_path, **{
        ".gitignore": "*.tmp\n/services/api/out/\n", "services/.gitignore": "!keep.tmp\n",
        ".git/info/exclude": "*.local\n/services/api/*.x\n",
        "services/api/a.tmp": "", "services/api/keep.tmp": "", "services/api/out/o": "",
        "services/api/c.local": "",
        "services/api/b.x": "", "services/api/d/b.x": "", "services/api/tracked.tmp": "",
    })  # fmt: skip
    git(tmp_path, "add", "-f", "services/api/tracked.tmp")
    assert sent(walk_project(tmp_path / "services/api", Policy())) == {"keep.tmp", "d/b.x", "tracked.tmp"}


def test_worktrees_and_submodules(tmp_path: Path) -> None:
    for name in ("main", "library"):
        (tmp_path / name).mkdir()
        git(tmp_path / name, "init", "-q", "-b", "main")
        write(tmp_path / name, **{".gitignore": "*.o\n", "f.o": "", "new.o": ""})
        git(tmp_path / name, "add", "-f", "f.o", ".gitignore")
        git(tmp_path / name, "commit", "-qm", "x")
    main = tmp_path / "main"
    git(main, "submodule", "--quiet", "add", str(tmp_path / "library"), "lib")
    (main / "lib/loose.o").write_text("")
    assert sent(walk_project(main, Policy())) == {
        ".gitignore",
        ".gitmodules",
        "f.o",
        "lib/.gitignore",
        "lib/f.o",
    }
    git(main, "worktree", "add", "-q", str(tmp_path / "tree"), "-b", "other")
    (main / ".git/info/exclude").write_text("excluded\n")
    write(tmp_path / "tree", excluded="", loose="")
    assert sent(walk_project(tmp_path / "tree", Policy())) == {".gitignore", "f.o", "loose"}


def test_the_repository_cannot_run_anything(project: Path, tmp_path: Path) -> None:
    git(project, "init", "-q")
    write(project, a="")
    git(project, "add", "a")
    hook = tmp_path / "hook"
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    hook.chmod(0o755)
    for key in ("core.fsmonitor", "core.sshCommand", "core.pager", "alias.ls-files", "core.editor"):
        git(project, "config", key, str(hook) if key != "alias.ls-files" else f"!{hook}")
    git(project, "config", "core.hooksPath", str(tmp_path))
    assert sent(walk_project(project, Policy())) == {"a"}
    assert not (tmp_path / "ran").exists()


def test_without_git_an_ignored_file_counts_as_ignored(project: Path) -> None:
    git(project, "init", "-q")
    write(project, **{".gitignore": "*.o\n", "a.o": "", "b": ""})
    git(project, "add", "-f", "a.o")

    class NoPrograms(Programs):
        def find(self, name: str) -> str | None:
            return None

    assert sent(walk_project(project, Policy(), programs=NoPrograms())) == {".gitignore", "b"}


def test_denied_paths(project: Path) -> None:
    write(project, **{"secrets/a": "", "x/secrets/b": "", "conf/p.yaml": "", "conf/p.txt": "", "z": ""})
    walk = walk_project(project, Policy(filesystem=FilesystemPolicy(denied_paths=("./secrets/", "conf/*.yaml"))))
    assert sent(walk) == {"x/secrets/b", "conf/p.txt", "z"}
    assert [(row.path, row.detail) for row in walk.withheld] == [
        ("conf/p.yaml", "conf/*.yaml"),
        ("secrets", "./secrets/"),
    ]
    with pytest.raises(RefusedError):
        walk_project(project, Policy(filesystem=FilesystemPolicy(denied_paths=(str(project.parent) + "/",))))


def test_a_project_reached_through_a_link_is_walked_where_it_is(project: Path, tmp_path: Path) -> None:
    write(project, a="")
    (tmp_path / "alias").symlink_to(project)
    assert walk_project(tmp_path / "alias", Policy()).root == project.resolve()


def test_a_root_that_is_missing_or_no_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "missing"):
        with pytest.raises(UserInputError) as caught:
            walk_project(path, Policy())
        assert str(path) in caught.value.brief


def as_nobody(action: str, project: Path) -> subprocess.CompletedProcess[str]:
    """Run a piece of Python without root's power to read everything."""
    code = (
        "import os, sys; from pathlib import Path\n"
        "from vmsandbox.guest.walk import walk_project; from vmsandbox.policy.values import FilesystemPolicy, Policy\n"
        "from vmsandbox.errors import UserInputError\n"
        "from vmsandbox.policy.tree.secrets import built_in\n"
        "import pathspec; built_in()  # while they can still be read: the checkout may be in /root\n"
        "os.getuid() == 0 and (os.setgroups([]), os.setgid(65534), os.setuid(65534))\n"
        f"{action}\n"
    )
    return subprocess.run([sys.executable, "-c", code, str(project)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("closed", ["dir", "dir/file", "dir/.gitignore", "."])
def test_what_cannot_be_read_is_named(closed: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name).resolve() / "p"
        write(root, **{"dir/file": "x", "dir/.gitignore": "y", "ok": ""})
        for path in (root.parent, root, *root.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
            if os.getuid() == 0:
                os.chown(path, 65534, 65534)
        (root / closed).chmod(0)
        try:
            done = as_nobody(
                "try: walk_project(Path(sys.argv[1]), Policy())\n"
                "except UserInputError as error: print(error.brief, error.details)",
                root,
            )
        finally:
            (root / closed).chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert (closed if closed != "." else str(root)) in done.stdout, done.stdout + done.stderr


def test_a_folder_replaced_by_a_link_during_the_walk_is_not_followed(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outside").mkdir()
    write(tmp_path, **{"outside/secret": "s"})
    write(project, **{"a/x": "", "b/y": ""})

    def swap() -> None:
        (project / "b/y").unlink()
        (project / "b").rmdir()
        (project / "b").symlink_to(tmp_path / "outside")

    opened = os.open

    def open_and_swap(name: object, *rest: object, **named: object) -> int:
        fd = opened(name, *rest, **named)  # type: ignore[arg-type]
        if name == "a":  # the root is listed by now, `b` still to come
            swap()
        return fd

    monkeypatch.setattr(os, "open", open_and_swap)
    with pytest.raises(UserInputError, match="changed while"):
        walk_project(project, Policy())


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (Limits(total_bytes=1000), "MiB"),
        (Limits(file_bytes=500), "a file larger"),
        (Limits(files=3), "3 files"),
        (Limits(names=3), "3 names"),
        (Limits(depth=2), "deep"),
    ],
)
def test_limits_name_what_is_large(project: Path, limits: Limits, said: str) -> None:
    write(project, **{"huge/big.bin": "x" * 900, "small": "x", "a/b/c/d": "", "more": "x" * 300})
    with pytest.raises(UserInputError) as caught:
        walk_project(project, Policy(), limits=limits)
    assert said in caught.value.brief
    if limits.files > 3 and limits.depth > 2 and limits.names > 3:
        assert "huge/big.bin" in caught.value.details and ".gitignore" in caught.value.resolution


def test_links_as_ignore_files_are_not_followed_and_a_fifo_does_not_block(project: Path) -> None:
    write(project, **{"rules": "*.py\n", "a.py": "", "sub/b.py": ""})
    (project / ".gitignore").symlink_to("rules")
    os.mkfifo(project / "sub/.gitignore")
    assert {"a.py", "sub/b.py"} <= sent(walk_project(project, Policy()))


def test_ten_thousand_files_in_about_half_a_second(project: Path) -> None:
    for folder in range(100):
        (project / f"d{folder}").mkdir()
        for number in range(100):
            (project / f"d{folder}/file_{number}.py").touch()
    (project / ".gitignore").write_text("".join(f"pattern{n}/\n*.x{n}\n" for n in range(25)))
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        walk = walk_project(
            project, Policy(filesystem=FilesystemPolicy(denied_paths=("./secrets/", "*.secret", "~/.ssh/")))
        )
        times.append(time.perf_counter() - begin)
    assert len(sent(walk)) == 10_001
    print("walk of 10,000 files:", [f"{one:.3f}" for one in times])
    assert min(times) < 2.0  # generous: a shared machine; some 0.3 s alone


# One tree of awkward names, and rules drawn from their pieces: git itself says what is ignored.
PATHS = [
    "a",
    "b/a",
    "b/c/a",
    "b/c/d.log",
    "a.log",
    "cache/x.log",
    "b/cache/x.log",
    "b/cache/y",
    "#x",
    "!y",
    "b/ z",
    "c/[q]",
]
PIECES = st.sampled_from(
    ["a", "b", "c", "*.log", "cache", "*", "**", "?", "[ab]", "[!a]", "x*", "d.*", "\\#x", "\\!y", "b*",
    "*a*", "#x", "[q]"]
)  # fmt: skip
RULE = st.builds(
    lambda negated, start, pieces, end: negated + start + "/".join(pieces) + end,
    st.sampled_from(["", "", "!"]),
    st.sampled_from(["", "", "/", "**/"]),
    st.lists(PIECES, min_size=1, max_size=3),
    st.sampled_from(["", "", "/", "/**", "/*", "/**/", " ", "\r"]),
)
RULES = st.lists(RULE, max_size=5).map("\n".join)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(top=RULES, inner=RULES, excluded=RULES)
def test_the_same_is_ignored_as_by_git(tmp_path: Path, top: str, inner: str, excluded: str) -> None:
    root = tmp_path / "repo"
    if not root.exists():
        root.mkdir()
        git(root, "init", "-q")
        write(root, **dict.fromkeys(PATHS, ""))
    write(root, **{".gitignore": top, "b/.gitignore": inner, ".git/info/exclude": excluded})
    listed = git(root, "ls-files", "-z", "--others", "--exclude-standard").split("\0")[:-1]
    assert sent(walk_project(root, Policy())) == set(listed)
