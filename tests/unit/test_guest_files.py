"""What root of a guest does in a home that the worker had, before a session: no link there leads it astray."""

from __future__ import annotations

import importlib.util
import os
import stat
import sys
from pathlib import Path
from types import ModuleType

import pytest

from vmsandbox.paths import resource_folder

GUEST = resource_folder("cloudinit") / "guest"
OTHER = 1000  # a user that is not root


@pytest.fixture
def forgetting(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A fresh copy of the module, which remembers what was written."""
    monkeypatch.syspath_prepend(str(GUEST))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    spec = importlib.util.spec_from_file_location("forgetting", GUEST / "vmsandbox_forget.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_that_are_not_roots_are_refused(tmp_path: Path, forgetting: ModuleType) -> None:
    from vmsandbox_files import refuse_links_of_others  # type: ignore[import-not-found]

    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("/nowhere/x")
    if os.geteuid() == 0:
        refuse_links_of_others(f"{tmp_path}/link/x")  # as /bin is one
        for name in ("link", "dangling"):
            os.lchown(tmp_path / name, OTHER, OTHER)
    refuse_links_of_others(f"{tmp_path}/real/missing/x")
    (tmp_path / "file").touch()
    refuse_links_of_others(f"{tmp_path}/file/x")
    for path in ("link", "link/x", "dangling", "dangling/y"):
        with pytest.raises(ValueError, match="in the way"):
            refuse_links_of_others(f"{tmp_path}/{path}")


def test_what_was_written_for_a_session_is_as_it_was(tmp_path: Path, forgetting: ModuleType) -> None:
    kept, grown, fresh = (tmp_path / name for name in ("kept", "grown", "fresh"))
    kept.write_text("before\n")
    kept.chmod(0o444)
    grown.write_text("first\n")
    for path in (kept, fresh, kept):  # a second session's would be remembered as the first one's
        forgetting.remember(str(path))
        path.unlink(missing_ok=True)
        path.write_text("the session's own, and longer than before\n")
    forgetting.remember(str(grown), appended=True)
    with grown.open("a") as file:
        file.write("the session's\n")
    for path, was in forgetting._before.items():
        forgetting.put_back(path, was)
    assert (kept.read_text(), stat.S_IMODE(kept.stat().st_mode)) == ("before\n", 0o444)
    assert grown.read_text() == "first\n" and not fresh.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="gives folders to another user")
def test_the_home_is_as_it_was_made_whatever_lies_there(
    tmp_path: Path, forgetting: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pwd

    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    home = tmp_path / "home"
    home.mkdir(mode=0o777)
    (home / "projects").symlink_to(outside)
    (home / ".claude").write_text("a file")
    monkeypatch.setattr(forgetting, "HOME", str(home))
    worker = pwd.struct_passwd(("w", "*", OTHER, OTHER, "", str(home), "/bin/bash"))
    forgetting.tidy_home(worker)
    assert (outside / "precious").exists()
    for name, mode in (("projects", 0o700), (".claude", 0o500)):
        info = (home / name).lstat()
        assert stat.S_ISDIR(info.st_mode) and (stat.S_IMODE(info.st_mode), info.st_uid) == (mode, OTHER)
    (home / "projects/app/deep").mkdir(parents=True)
    (home / "projects/app/link").symlink_to(outside)
    (home / ".claude/settings").touch()
    forgetting.tidy_home(worker)
    assert list((home / "projects").iterdir()) == [] and (home / ".claude/settings").exists()
    assert (outside / "precious").exists() and stat.S_IMODE(home.stat().st_mode) == 0o700
