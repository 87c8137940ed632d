"""What every test may use: golden files, and the flag that writes them anew."""

from __future__ import annotations

import difflib
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"

# Whoever starts the tests in the background of a script, or with nohup, has Ctrl-C or a hangup ignored by all that they
# start, and some send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write tests/golden anew instead of comparing with it"
    )


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compares a text with the file of that name in tests/golden; shows the difference when they differ."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        kept = path.read_text() if path.exists() else ""
        lines = difflib.unified_diff(kept.splitlines(), text.splitlines(), f"golden/{name}", "now", lineterm="")
        assert kept == text, "\n".join([*lines, "(right? then: pytest --update-golden)"])

    return check


@pytest.fixture
def short_home() -> Iterator[Path]:
    """A home that does not exist yet, with a path short enough for sockets (tmp_path's is too long)."""
    folder = Path(tempfile.mkdtemp(prefix="vmsb-"))
    yield folder / "h"
    shutil.rmtree(folder)
