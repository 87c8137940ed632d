"""The lock of a session's guest: many may use it, one may change it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from vmsandbox.errors import UserInputError
from vmsandbox.paths import Layout
from vmsandbox.session.state.folder import SessionFolder
from vmsandbox.session.state.guestlock import guest_locked


@pytest.fixture
def folder(short_home: Path) -> SessionFolder:
    folder = SessionFolder(Layout.from_environment({"VMSANDBOX_HOME": str(short_home)}), "one")
    folder.path.mkdir(parents=True)
    return folder


def test_many_may_share_it_and_one_may_have_it_alone(folder: SessionFolder) -> None:
    with (
        guest_locked(folder, shared=True),
        guest_locked(folder, shared=True),
        pytest.raises(UserInputError, match="'one' is being"),
        guest_locked(folder),
    ):
        pass
    with guest_locked(folder):
        for shared in (True, False):
            with pytest.raises(UserInputError), guest_locked(folder, shared=shared):
                pass
    with guest_locked(folder):
        pass


def test_it_can_be_waited_for(folder: SessionFolder) -> None:
    taken, give_back = threading.Event(), threading.Event()

    def hold() -> None:
        with guest_locked(folder):
            taken.set()
            give_back.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait(10)
    with pytest.raises(UserInputError), guest_locked(folder, shared=True, patience=0.2):
        pass
    began = time.monotonic()
    threading.Timer(0.5, give_back.set).start()
    with guest_locked(folder, shared=True, patience=10):
        assert 0.4 < time.monotonic() - began < 9
    thread.join()
