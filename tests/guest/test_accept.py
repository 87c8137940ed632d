"""What comes back: nothing by itself, exactly what was accepted, and the tree of before is never lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Cli, Guest, git, make_tree, tree_of

RULES = """
rules:
  - id: no-todo
    pattern: 'TODO'
    severity: error
    message: "finish it first"
  - id: no-forbidden
    command: "touch {canary}; test ! -e forbidden.txt"
    severity: error
    message: "no forbidden file"
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A small project with git."""
    files = {"README.md": "# demo\n", "src/app.py": "one\ntwo\nthree\n", "old.txt": "old\n", "tool.sh": "#!/bin/sh\n"}
    root = make_tree(tmp_path / "demo", files)
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "start")
    return root


@pytest.fixture(scope="session")
def werkzeug(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source of a well-known project, as its authors publish it: some three hundred files."""
    folder = tmp_path_factory.mktemp("werkzeug")
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*download, "--dest", folder, "werkzeug==3.0.4"], check=True, timeout=300)
    with tarfile.open(folder / "werkzeug-3.0.4.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    root = folder / "werkzeug-3.0.4"
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "as published")
    return root


def test_a_real_project_gets_exactly_what_was_accepted(cli: Cli, werkzeug: Path) -> None:
    before = tree_of(werkzeug)
    script = """
        set -e
        test $(git log --oneline | wc -l) = 1; test -z "$(git status --porcelain)"
        sed -i 's/^import .*/&  # seen/' src/werkzeug/http.py
        mkdir src/werkzeug/extra; echo 'def more(): return 1' > src/werkzeug/extra/more.py
        rm docs/index.rst; chmod 755 README.md
        mkdir -p .github/workflows; echo 'on: push' > .github/workflows/ci.yml
        git -c user.name=g -c user.email=g@g checkout -q -b work
        git add -A; git -c user.name=g -c user.email=g@g commit -q -m 'by the guest'
        git -c user.name=g -c user.email=g@g branch -f main HEAD
    """
    report = cli.json("session", werkzeug, "--commits", "--", "sh", "-c", script)
    assert report["status"] == 0 and report["applied"] == [], "no person, nothing accepted"
    after = {path: value for path, value in tree_of(werkzeug).items() if not path.startswith(".git/")}
    assert after == {path: value for path, value in before.items() if not path.startswith(".git/")}

    risks = {row["path"]: {f["risk"] for f in row["findings"]} for row in report["changes"]["review"]}
    assert risks["src/werkzeug/http.py"] == set() and risks["src/werkzeug/extra/more.py"] == set()
    assert risks[".github/workflows/ci.yml"] == {"auto-executed"}
    assert risks["README.md"] == {"executable"} and risks["docs/index.rst"] == {"deletion"}

    # Only below refs/vmsandbox, and the host's own branch, index and tree are where they were.
    ref = f"refs/vmsandbox/{report['id']}/work"
    assert [row["ref"] for row in report["commits"]["branches"] if row["name"] == "work"] == [ref]
    assert git(werkzeug, "log", "-1", "--format=%s", ref) == "by the guest"
    assert git(werkzeug, "log", "-1", "--format=%s", "HEAD") == "as published"
    assert git(werkzeug, "for-each-ref", "--format=%(refname)", "refs/heads", "refs/tags").splitlines() == [
        git(werkzeug, "symbolic-ref", "HEAD")
    ]

    # The guest is gone; what it left is taken in part: a folder brings no change with a risk along.
    digest = report["changes"]["digest"]
    taken = cli.json("accept", report["id"], "src", ".github", "docs/index.rst", "--digest", digest[:12])
    assert sorted(taken["applied"]) == [
        "docs/index.rst", "src/werkzeug/extra", "src/werkzeug/extra/more.py", "src/werkzeug/http.py",
    ]  # fmt: skip
    assert set(git(werkzeug, "status", "--porcelain", "-uall").splitlines()) == {
        " D docs/index.rst", " M src/werkzeug/http.py", "?? src/werkzeug/extra/more.py",
    }  # fmt: skip
    assert "# seen" in (werkzeug / "src/werkzeug/http.py").read_text()

    # The patch of the rest is one that git takes; and the tree of before can be had again, work and history.
    patch = cli("changes", report["id"], "--diff").stdout
    subprocess.run(["git", "-C", werkzeug, "apply", "--check"], input=patch, check=True)
    restored = Path(cli("restore", report["id"]).stdout.decode().strip())
    assert {p: v for p, v in tree_of(restored).items() if not p.startswith(".git/")} == {
        p: v for p, v in before.items() if not p.startswith(".git/")
    }
    assert git(restored, "log", "--format=%s") == "as published"


def test_safe_takes_only_what_has_no_risk_and_all_what_is_not_blocked(cli: Cli, repository: Path) -> None:
    script = "echo more >> README.md; echo 'all:' > Makefile; rm old.txt; ln -s /etc/passwd link; echo n > new.txt"
    report = cli.json("session", repository, "--accept", "safe", "--", "sh", "-c", script)
    assert sorted(report["applied"]) == ["README.md", "new.txt"]
    assert git(repository, "status", "--porcelain").splitlines() == [" M README.md", "?? new.txt"]
    report = cli.json("session", repository, "--accept", "all", "--", "sh", "-c", script)
    assert sorted(report["applied"]) == ["Makefile", "README.md", "old.txt"]
    assert not (repository / "link").is_symlink(), "a link out of the project is never taken"


def test_a_review_is_looked_at_and_is_of_this_project_as_it_was(cli: Cli, repository: Path, tmp_path: Path) -> None:
    script = "echo guest >> src/app.py; echo n > new.txt; rm old.txt; echo '<script>alert(1)</script>' >> README.md"
    report = cli.json("session", repository, "--", "sh", "-c", script)
    # The page holds no script and is written where asked.
    page = tmp_path / "review.html"
    cli("changes", report["id"], "--html", page)
    text = page.read_text()
    assert "<script" not in text and "&lt;script&gt;alert(1)" in text and report["changes"]["digest"] in text
    assert os.stat(page).st_size < 200_000
    # In a terminal a person is asked: the end of the input at the first question takes nothing.
    before = tree_of(repository)
    words = [sys.executable, "-m", "vmsandbox", "accept", report["id"]]
    command = ["script", "-qec", " ".join(words), "/dev/null"]
    done = subprocess.run(command, input=b"\x04", capture_output=True, env=cli.environment, timeout=120)
    assert done.returncode == 0 and b"nothing" in done.stdout and tree_of(repository) == before
    # Neither another review nor a project that moved on.
    done = cli("accept", report["id"], "--all", "--digest", "0123456789abcdef", status=126)
    assert b"not what was reviewed" in done.stderr and tree_of(repository) == before
    (repository / "src/app.py").write_text("host work\n")
    moved_on = tree_of(repository)
    done = cli("accept", report["id"], "--all", status=125)
    assert b"src/app.py" in done.stderr and tree_of(repository) == moved_on, "all or nothing"
    assert cli.json("accept", report["id"], "new.txt")["applied"] == ["new.txt"]
    assert (repository / "src/app.py").read_text() == "host work\n"
    assert b"did not change" in cli("accept", report["id"], "nowhere.txt", status=125).stderr


def test_rules_of_the_project_hold_and_their_commands_run_in_a_guest_of_their_own(cli: Cli, repository: Path) -> None:
    canary = f"/tmp/vmsandbox-canary-{uuid.uuid4().hex}"
    (repository / ".claude").mkdir()
    (repository / ".claude/security-rules.yaml").write_text(RULES.format(canary=canary))
    # The guest takes the rules away and forges the tools; neither counts.
    script = "rm .claude/security-rules.yaml; echo '# TODO' >> src/app.py; echo fine > fine.txt; echo x > forbidden.txt"
    report = cli.json("session", repository, "--accept", "all", "--", "sh", "-c", script)
    assert report["applied"] == [] and not Path(canary).exists(), "a command of the rules ran on the host"
    whole = report["changes"]["findings"]
    assert [row for row in whole if row["blocks"] and "no-forbidden" in row["text"]], whole
    rows = {row["path"]: row for row in report["changes"]["review"]}
    assert rows["src/app.py"]["blocked"] and "finish it first" in json.dumps(rows["src/app.py"])
    assert not rows["fine.txt"]["blocked"]
    assert b"no-forbidden" in cli("accept", report["id"], "src/app.py", status=126).stderr


def test_a_running_guest_is_accepted_from_again_and_again(fork: Callable[..., Guest], repository: Path) -> None:
    guest = fork(repository)
    guest.sh("echo first >> README.md; printf 'one\\n2\\nthree\\n' > src/app.py")
    assert sorted(guest.cli.json("accept", guest.name, "--safe")["applied"]) == ["README.md", "src/app.py"]
    assert guest.cli("changes", guest.name).stdout == b"no changes\n", "what was accepted is no change any more"
    guest.sh("echo second >> README.md; git -c user.name=g -c user.email=g@g commit -qam guest")
    taken = guest.cli.json("accept", guest.name, "README.md", "--commits")
    assert (repository / "README.md").read_text() == "# demo\nfirst\nsecond\n"
    assert len(taken["commits"]["branches"]) == 1
    kinds = [event["kind"] for event in guest.journal()]
    assert kinds.count("changes.applied") == 2 and kinds.index("changes.accepted") > kinds.index("changes.reviewed")
