"""Programs that fetch packages, and the bundle of hosts that each needs.

Without them a command that cannot work without a network would only be known by its failure.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable

_BUNDLES = {
    "pip": "@pypi", "pip3": "@pypi", "uv": "@pypi", "poetry": "@pypi", "pipenv": "@pypi", "pdm": "@pypi",
    "npm": "@npm", "npx": "@npm", "yarn": "@npm", "pnpm": "@npm", "cargo": "@crates", "go": "@go",
    "gem": "@rubygems", "bundle": "@rubygems",
}  # fmt: skip


def bundles_for(command: Iterable[str]) -> tuple[str, ...]:
    """The bundles (`@pypi`) of the programs that a command names, sorted; a text for a shell counts by its words."""
    words = {word.strip(";&|()").rpartition("/")[2] for text in command for word in text.split()}
    return tuple(sorted({_BUNDLES[word] for word in words if word in _BUNDLES}))


def shown_command(command: Iterable[str]) -> str:
    """A command in one line; a text for a shell as it was written."""
    words = list(command)
    return words[2] if words[:2] == ["sh", "-c"] and len(words) == 3 else shlex.join(words)
