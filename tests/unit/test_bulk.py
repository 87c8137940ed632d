"""The port that a project goes in through, against a peer that reads, stops, or ends."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import pytest

from vmsandbox.errors import GuestError
from vmsandbox.guest.bulk import BulkPort


@pytest.fixture
def peer(tmp_path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "bulk"))
    listener.listen(1)
    return listener


def test_all_arrives(peer: socket.socket, tmp_path: Path) -> None:
    port = BulkPort(tmp_path / "bulk")
    guest, _ = peer.accept()
    taken = bytearray()

    def read() -> None:
        while piece := guest.recv(4096):
            taken.extend(piece)

    thread = threading.Thread(target=read)
    thread.start()
    sent = bytes(range(256)) * 5000
    for start in range(0, len(sent), 300_000):
        port.write(sent[start : start + 300_000], lambda: False)
    port.close()
    thread.join(10)
    assert bytes(taken) == sent


def test_a_reader_that_ended_ends_the_writing(peer: socket.socket, tmp_path: Path) -> None:
    port = BulkPort(tmp_path / "bulk")
    began = time.monotonic()
    with pytest.raises(GuestError, match="ended before"):
        port.write(bytes(50 << 20), lambda: time.monotonic() - began > 0.2)
    assert time.monotonic() - began < 5


def test_a_reader_that_takes_nothing_is_given_up(peer: socket.socket, tmp_path: Path) -> None:
    port = BulkPort(tmp_path / "bulk")
    with pytest.raises(GuestError, match="took nothing for 1 seconds"):
        port.write(bytes(50 << 20), lambda: False, patience=1)
    port.nudge()  # never blocks
    port.close()


def test_a_guest_that_goes_away(peer: socket.socket, tmp_path: Path) -> None:
    port = BulkPort(tmp_path / "bulk")
    peer.accept()[0].close()
    with pytest.raises(GuestError, match="went away"):
        port.write(bytes(50 << 20), lambda: False)
