"""What the broker's tests share: the two authorities, and a folder for their files."""

from __future__ import annotations

from pathlib import Path

import pytest
from broker_servers import Authority, authority


@pytest.fixture(scope="module")
def session() -> Authority:
    """The session's own: the guest trusts it."""
    return authority("session")


@pytest.fixture(scope="module")
def upstream() -> Authority:
    """The servers': the broker trusts it."""
    return authority("upstream")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("broker")
