"""The files that command rules put into a guest."""

from __future__ import annotations

import json
from collections.abc import Callable

from vmsandbox.policy.values import CommandsPolicy
from vmsandbox.render.commands import RULES, command_files

RULED = CommandsPolicy(
    allowed=("python", "git"),
    denied=("rm -rf /", "echo 'a b' \"\n\" ;"),
    require_confirmation=("pip install *",),
    confirm_seconds=30,
    within=(CommandsPolicy(denied=("curl *",), within=(CommandsPolicy(allowed=("python", "git", "ls")),)),),
)


def test_without_rules_there_is_nothing() -> None:
    assert command_files(CommandsPolicy()) == []
    assert command_files(CommandsPolicy(within=(CommandsPolicy(),), confirm_seconds=5)) == []
    assert command_files(CommandsPolicy(within=(CommandsPolicy(denied=("curl",)),)))


def test_the_files_are_the_ones_that_were_reviewed(golden: Callable[[str, str], None]) -> None:
    files = command_files(RULED)
    golden("commands.txt", "".join(f"== {path} {mode:04o}\n{text}" for path, mode, text in files))
    (rules,) = [json.loads(text) for path, _mode, text in files if path == RULES]
    assert [layer["denied"] for layer in rules["layers"]] == [["rm -rf /", "echo 'a b' \"\n\" ;"], ["curl *"], []]
