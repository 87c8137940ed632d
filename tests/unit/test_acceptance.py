"""From a record to the project without a guest: what an ended session left is reviewed, named, taken or refused."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trees import File, Tree, manifest_of, read_tree, write_tree

from vmsandbox.journal import events
from vmsandbox.journal.chain import Journal
from vmsandbox.paths import Layout
from vmsandbox.receive.store import seal
from vmsandbox.session.records.record import Record
from vmsandbox.session.records.unfinished import parts_in_records, unfinished_projects

REPOSITORY = Path(__file__).resolve().parents[2]
ID = "20260101-000000-old-abcdef"
OLD: Tree = {"a.txt": File(b"one\n"), "src/b.py": File(b"x = 1\n"), "gone.txt": File(b"bye\n")}
NEW: Tree = {
    "a.txt": File(b"one\ntwo \x1b]52;c;eA==\x07\xe2\x80\xae\n"),
    "src/b.py": File(b"x = 2\n"),
    "src/conftest.py": File(b"import os\n"),
    "src/new/c.py": File(b"y = 1\n"),
}


class Ended:
    """A session that has ended, with its work in quarantine; and the command line on it."""

    def __init__(self, home: Path, new: Tree = NEW, grade: str = "emulated") -> None:
        self.home, self.project = home, home / "project"
        self.project.mkdir()
        write_tree(self.project, OLD)
        folder = home / "records" / ID
        (folder / "quarantine/blobs").mkdir(parents=True)
        journal = Journal(folder / "events.jsonl")
        journal.append(events.SessionOpened(ID, "old", "u", str(self.project), "0"))
        journal.append(events.ForkStarted("own", "d", "t", "none", 3, 400))
        journal.append(events.IsolationAssessed(grade, {}))
        journal.append(events.ProjectPushed(3, 1, 0, manifest_of(OLD).digest, str(self.project)))
        (folder / "pushed.jsonl").write_bytes(b"".join(manifest_of(OLD).lines()))
        for entry in new.values():
            assert isinstance(entry, File)
            (folder / "quarantine/blobs" / hashlib.sha256(entry.data).hexdigest()).write_bytes(entry.data)
        self.digest = seal(folder / "quarantine", manifest_of(new)).digest
        self.record = Record(folder)
        self.environment = {**os.environ, "VMSANDBOX_HOME": str(home), "PYTHONPATH": str(REPOSITORY), "NO_COLOR": "1"}

    def __call__(self, *words: str, status: int = 0) -> subprocess.CompletedProcess[bytes]:
        argv = [sys.executable, "-m", "vmsandbox", words[0], ID, *words[1:]]
        done = subprocess.run(argv, input=b"", capture_output=True, env=self.environment, timeout=60)
        assert done.returncode == status, done.stderr
        return done

    def json(self, *words: str) -> Any:
        return json.loads(self(*words, "--json").stdout)


@pytest.fixture
def ended() -> Iterator[Ended]:
    with tempfile.TemporaryDirectory(prefix="vms-") as home:  # pytest's own is too long for the sockets' folder
        yield Ended(Path(home))


def test_a_named_folder_brings_no_risk_along_and_a_named_file_does(ended: Ended) -> None:
    assert sorted(ended.json("accept", "src")["applied"]) == ["src/b.py", "src/new", "src/new/c.py"]
    assert ended.json("accept", "src/conftest.py")["applied"] == ["src/conftest.py"]
    assert sorted(read_tree(ended.project)) == ["a.txt", "gone.txt", "src/b.py", "src/conftest.py", "src/new/c.py"]
    assert [change["path"] for change in ended.json("changes")["review"]] == ["a.txt", "gone.txt"], "the rest is open"


def test_an_approval_is_for_the_tree_that_was_reviewed(ended: Ended) -> None:
    before = read_tree(ended.project)
    for digest in ("0" * 64, ended.digest[:11], ""):
        assert b"not what was reviewed" in ended("accept", "--all", "--digest", digest, status=126).stderr
    assert b"without a person" in ended("accept", status=126).stderr
    assert read_tree(ended.project) == before
    assert "src/b.py" in ended.json("accept", "--all", "--digest", ended.digest[:12])["applied"]


def test_what_was_accepted_is_noted_though_a_push_removed_the_rest(ended: Ended) -> None:
    shutil.rmtree(ended.record.folder / "quarantine")
    ended.record.set_base(ended.record.base_of_return(), manifest_of(NEW))
    assert ended.record.base() == manifest_of(NEW)


def test_what_goes_with_a_push_is_counted_and_goes_whole(ended: Ended) -> None:
    open_now = len(ended.json("changes")["review"])
    ended("accept", "src/b.py")
    assert ended.record.drop_return() == open_now - 1 > 0
    left = {path.name for path in ended.record.folder.iterdir() if not path.name.startswith("accepted")}
    assert left == {"events.jsonl", "pushed.jsonl"}
    assert ended.record.drop_return() == 0


def test_a_quarantine_that_was_tampered_with_is_refused(ended: Ended) -> None:
    blob = ended.record.folder / "quarantine/blobs" / hashlib.sha256(b"x = 2\n").hexdigest()
    blob.chmod(0o600)
    blob.write_bytes(b"x = 9\n")
    before = read_tree(ended.project)
    assert b"digest" in ended("accept", "src/b.py", status=126).stderr
    assert read_tree(ended.project) == before


def test_the_rules_are_the_hosts_and_never_through_a_link(ended: Ended, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("rules: [{id: no-two, pattern: two, severity: error, message: no two}]\n")
    (ended.project / ".claude").mkdir()
    (ended.project / ".claude/security-rules.yaml").symlink_to(rules)
    assert b"security-rules.yaml" in ended("changes", status=125).stderr
    (ended.project / ".claude/security-rules.yaml").unlink()
    rules.rename(ended.project / ".claude/security-rules.yaml")
    ended("accept", "a.txt", status=126)
    (ended.project / ".claude/security-rules.yaml").write_text("rulez: []\n")
    done = ended("changes", status=125)
    assert b"rulez" in done.stderr and b"rules" in done.stderr


def test_a_patch_is_exact_in_a_pipe_and_harmless_on_a_terminal(ended: Ended) -> None:
    piped = ended("changes", "--diff").stdout
    assert b"\x1b]52;c;eA==\x07\xe2\x80\xae" in piped
    main, terminal = pty.openpty()
    argv = [sys.executable, "-m", "vmsandbox", "changes", ID, "--diff"]
    child = subprocess.Popen(argv, stdout=terminal, stdin=subprocess.DEVNULL, env=ended.environment)
    os.close(terminal)
    shown = b""
    while True:
        try:
            piece = os.read(main, 65536)
        except OSError:  # EIO: the other side is closed
            break
        shown += piece
    os.close(main)
    assert child.wait(30) == 0
    assert b"+two \\x1b]52" in shown
    assert not [bad for bad in (b"\x1b", b"\x07", b"\xe2\x80\xae") if bad in shown]


@pytest.mark.parametrize(("grade", "allowed"), [("emulated", True), ("separated", False), ("isolated", False)])
def test_a_second_guest_is_emulated_only_if_the_first_was(tmp_path: Path, grade: str, allowed: bool) -> None:
    request = Ended(tmp_path, grade=grade).record.request()
    assert request.allow_emulation is allowed
    assert (request.image, request.vcpus, request.memory_mib) == ("own", 3, 400)


def test_a_killed_apply_is_undone_by_the_next_command(ended: Ended) -> None:
    before = read_tree(ended.project)
    argv = [sys.executable, "-m", "vmsandbox", "accept", ID, "--all"]
    failpoint = {"VMSANDBOX_FAILPOINT": "apply.step#3=kill"}
    killed = subprocess.run(argv, capture_output=True, env={**ended.environment, **failpoint}, timeout=60)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path for path in ended.project.iterdir() if path.name.startswith(".vmsandbox-apply-")]
    told = list(unfinished_projects(Layout.from_environment({"VMSANDBOX_HOME": str(ended.home)})))
    assert [part.what for part in told] == [str(ended.project)] and not told[0].problem
    assert read_tree(ended.project) == before
    assert "src/b.py" in ended.json("accept", "--all")["applied"]


def test_parts_of_a_killed_session_are_removed_from_its_record(ended: Ended) -> None:
    for name in (".backup", "history-x", "commits-y", "quarantine.0a", ".gone-backup.0a"):
        (ended.record.folder / name).mkdir()
    layout = Layout.from_environment({"VMSANDBOX_HOME": str(ended.home)})
    (layout.records / ".gone-another.0a" / "backup").mkdir(parents=True)
    assert len(list(parts_in_records(layout))) == 6 and list(parts_in_records(layout)) == []
    assert {path.name for path in ended.record.folder.iterdir()} == {"events.jsonl", "pushed.jsonl", "quarantine"}
    assert [path.name for path in layout.records.iterdir()] == [ID]
