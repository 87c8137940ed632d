"""A project goes in without what must stay, and what changed in the guest is listed as it is."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from harness import Guest, make_tree

SECRET = "hunter2-very-secret"


def make_project(tmp_path: Path) -> Path:
    (tmp_path / "outside.txt").write_text(SECRET)
    root = make_tree(
        tmp_path / "app",
        {
            ".gitignore": "ignored/\n",
            "keep.txt": "same\n",
            "edit.txt": "before\n",
            "remove.txt": "gone soon\n",
            "move-me.txt": "a content of its own\n",
            "script.sh": "#!/bin/sh\n",
            "ü b/-rf": "odd name\n",
            ".env": SECRET,
            "id_ed25519": SECRET,
            "ignored/build.o": SECRET,
            "private/plan.txt": SECRET,
            "policy.yaml": "sandbox:\n  filesystem:\n    denied_paths: [private/]\n",
        },
    )
    (root / "script.sh").chmod(0o755)
    (root / "inside-link").symlink_to("keep.txt")
    (root / "outside-link").symlink_to("../outside.txt")
    (root / "absolute-link").symlink_to("/etc/shadow")
    os.mkfifo(root / "pipe")
    subprocess.run(["git", "init", "-q", root], check=True)
    return root


def test_what_must_stay_stays_and_is_listed(fork: Callable[..., Guest], tmp_path: Path) -> None:
    root = make_project(tmp_path)
    guest = fork(root, "--policy", root / "policy.yaml")
    inside = guest.sh("find . | sort").splitlines()
    for name in (".env", "id_ed25519", "ignored", "private", "outside-link", "absolute-link", "pipe"):
        assert not [path for path in inside if path.startswith(f"./{name}") and path != "./.gitignore"], name
    assert guest.sh("grep -r hunter2 . | head; true") == ""
    assert guest.sh("readlink inside-link; stat -c %a script.sh; cat 'ü b/-rf'") == "keep.txt\n755\nodd name"
    rows = {row["path"]: row["reason"] for row in guest.cli.json("logs", guest.name, "--withheld")}
    for name in (".env", "id_ed25519", "ignored", "private", "outside-link", "absolute-link", "pipe", ".git"):
        assert name in rows, f"{name} was left out without a word"
    assert "policy" in rows["private"] and "secret" in rows[".env"] and "link" in rows["outside-link"]
    assert SECRET not in json.dumps(guest.journal()), "a secret in the record"

    # The same session, on: nothing changed yet, then everything does.
    assert guest.cli("changes", guest.name).stdout == b"no changes\n"
    guest.sh(
        r"""
        echo after > edit.txt; rm remove.txt; mv move-me.txt moved.txt; chmod 644 script.sh; rm inside-link
        mkdir new; echo n > new/file; ln -s /etc/passwd new/link; mkfifo new/fifo
        touch "$(printf 'evil\033]52;c;eA==\007\nM fake')"; rm -rf 'ü b'; echo sub > ignored-now
        git init -q . 2>/dev/null; echo hook > .git/hooks/post-checkout; true
        """
    )
    document = guest.cli.json("changes", guest.name)
    paths = {kind: [row["path"] for row in document[kind]] for kind in ("added", "modified", "deleted", "mode_changed")}
    assert paths["modified"] == ["edit.txt"]
    assert paths["mode_changed"] == ["script.sh"]
    assert {"remove.txt", "inside-link", "ü b", "ü b/-rf"} <= set(paths["deleted"])
    assert [(row["from"], row["path"]) for row in document["renamed"]] == [("move-me.txt", "moved.txt")]
    assert {"new", "new/file", "new/link", "new/fifo", "ignored-now"} <= set(paths["added"])
    assert not [
        path for path in paths["added"] + paths["deleted"] if ".git/" in path or path == ".git" or ".env" in path
    ]
    evil = [path for path in paths["added"] if "evil" in path]
    assert evil == ["evil\x1b]52;c;eA==\x07\nM fake"], "in JSON the name is exact"
    shown = guest.cli("changes", guest.name).stdout
    assert b"\x1b" not in shown and b"\x07" not in shown
    assert not [line for line in shown.splitlines() if line.startswith(b"M fake")]
    assert b"digest" in shown
    assert sorted(path.name for path in root.iterdir() if path.name.startswith(("new", "moved"))) == []

    # Pushed again, it is as on the host again.
    guest.cli("push", guest.name, root, "--policy", root / "policy.yaml")
    assert guest.cli("changes", guest.name).stdout == b"no changes\n"
    assert guest.sh("cat edit.txt; ls new 2>&1; true").startswith("before\n")


def test_a_session_with_a_command_is_whole_in_one_go(cli: object, tmp_path: Path) -> None:
    from harness import Cli

    assert isinstance(cli, Cli)
    root = make_tree(tmp_path / "app", {"a.txt": "a\n", "-x'$(id)\n": "odd\n"})
    done = cli("session", root, "--name", "whole", "--", "sh", "-c", "echo out; echo b > b.txt; exit 9", status=9)
    assert done.stdout == b"out\n"
    assert b"A b.txt" in done.stderr and b"1 added" in done.stderr and b"emulated" in done.stderr
    records = [path for path in cli.layout.records.iterdir() if "-whole-" in path.name]
    assert records
    events = [json.loads(line)["kind"] for line in cli("logs", "whole", "--json").stdout.splitlines()]
    assert events == [
        "session.opened", "guest.forked", "guest.isolation", "guest.ready", "project.pushed", "command.started",
        "command.ended", "return.received", "session.closed", "changes.reviewed",
    ]  # fmt: skip
    assert sorted(path.name for path in root.iterdir()) == sorted(["a.txt", "-x'$(id)\n"]), "the project was touched"

    report = cli.json("session", root, "--", "sh", "-c", "echo not mixed in; exit 4", status=4)
    assert report["status"] == 4 and report["leftovers"] == [] and report["changes"]["counts"]["added"] == 0
    assert report["grade"] in ("emulated", "separated", "isolated")
    assert len(report["image"]["digest"]) == 64


def test_a_project_named_like_an_option(fork: Callable[..., Guest], tmp_path: Path) -> None:
    root = make_tree(tmp_path / "-oProxyCommand=touch oops; $(id)", {"a": "1"})
    guest = fork(f"{tmp_path}/{root.name}")
    assert guest.exec("pwd").stdout == b"/home/claude-worker/projects/project\n"
    assert guest.sh("ls") == "a"
