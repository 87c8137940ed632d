"""The script that unpacks a project in the guest, with a FIFO in the port's place: what fails in it is told."""

from __future__ import annotations

import io
import os
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from vmsandbox.guest.pack import RECORD, pack_files
from vmsandbox.session.transfer.archive import PORT
from vmsandbox.session.transfer.project import _unpacking

LISTER = '#!/bin/sh\nread -r word; [ "$word" = unpacked ] || exit 3; cat > /dev/null; echo listed\n'


@pytest.mark.parametrize("lists", [True, False])
@pytest.mark.parametrize("broken", [None, "project", "git"])
def test_both_archives_arrive_or_it_is_a_failure(tmp_path: Path, lists: bool, broken: str | None) -> None:
    stream = io.BytesIO()
    for part, path in (("project", "a"), ("git", ".git/HEAD")):
        if part == broken:
            stream.write(b"\xff" * RECORD)
        else:
            pack_files(iter([(path, 1, (b"x",))]), stream.write)
    port, lister, target = tmp_path / "port", tmp_path / "lister", tmp_path / "project"
    os.mkfifo(port)
    lister.write_text(LISTER)
    lister.chmod(0o755)
    script = _unpacking(lists=lists, git=True).replace(PORT, str(port))
    argv = ["sh", "-c", script, "sh", str(target), str(lister)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as shell:
        with suppress(BrokenPipeError), port.open("wb") as writing:
            writing.write(stream.getvalue())
        out, _ = shell.communicate(timeout=30)
    assert (shell.returncode == 0) == (broken is None)
    if broken is None:
        assert sorted(path.name for path in target.iterdir()) == [".git", "a"]
        assert out == (b"listed\n" if lists else b"")
