"""Finds and reads a policy file, and says exactly where it is wrong.

Without the line, the key and a suggestion, a person whose policy is refused would delete the policy.
"""

from __future__ import annotations

import difflib
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmsandbox.errors import UserInputError
from vmsandbox.policy.values import Policy

if TYPE_CHECKING:
    import yaml
    from pydantic_core import ErrorDetails

MAX_BYTES = 256 * 1024
NAMES = (".claude/sandbox.yaml", ".vmsandbox.yaml")
_KEYS: dict[tuple[str, ...], tuple[str, ...]] = {
    (): ("sandbox",),
    ("sandbox",): ("filesystem", "network", "commands"),
    ("sandbox", "filesystem"): ("allowed_paths", "denied_paths"),
    ("sandbox", "network"): ("mode", "allowed_hosts", "denied_hosts"),
    ("sandbox", "commands"): ("allowed", "denied", "require_confirmation"),
}
_MODES = ("none", "restricted", "proxy", "filtered")

KeyPath = tuple[str | int, ...]


def find_policy(project: Path) -> Path | None:
    """The project's policy file: `.claude/sandbox.yaml`, else `.vmsandbox.yaml`, else None.

    Raises:
        UserInputError: whether there is one cannot be told (no permission). A policy is never skipped
            silently.
    """
    for name in NAMES:
        path = project / name
        try:
            path.lstat()  # a dangling link counts: reading it then says what is wrong
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise UserInputError(
                f"the policy cannot be looked for: {path}",
                details=str(error),
                resolution="make its folder readable, or name a policy with --policy",
            ) from error
        return path
    return None


def load_policy(path: Path) -> Policy:
    """Read and check one policy file (the format of `.claude/sandbox.yaml`, at most 256 KiB).

    Raises:
        UserInputError: it cannot be read, or is not a policy; names the file, the line and the key.
    """
    text = _read(path)
    data, lines = _parse(path, text)
    from pydantic import ValidationError

    from vmsandbox.policy.model import PolicyFile

    try:
        sandbox = PolicyFile.model_validate(data).sandbox
    except ValidationError as error:
        raise _invalid(path, [_problem(one, lines) for one in error.errors(include_url=False)]) from None
    return Policy(
        allowed_paths=tuple(sandbox.filesystem.allowed_paths),
        denied_paths=tuple(sandbox.filesystem.denied_paths),
        network_mode=sandbox.network.mode,
        allowed_hosts=tuple(sandbox.network.allowed_hosts),
        denied_hosts=tuple(sandbox.network.denied_hosts),
        commands_allowed=tuple(sandbox.commands.allowed),
        commands_denied=tuple(sandbox.commands.denied),
        commands_require_confirmation=tuple(sandbox.commands.require_confirmation),
        source=path,
    )


def _read(path: Path) -> str:
    # O_NONBLOCK: a FIFO in the file's place must not block.
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UserInputError(f"the policy cannot be read: {path}", details=str(error)) from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UserInputError(
                f"the policy is not a regular file: {path}", resolution="name a YAML file with --policy"
            )
        with os.fdopen(fd, "rb", closefd=False) as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserInputError(f"the policy cannot be read: {path}", details=str(error)) from error
    finally:
        os.close(fd)
    if len(content) > MAX_BYTES:
        raise UserInputError(
            f"the policy is too large: {path}",
            details=f"a policy may have {MAX_BYTES // 1024} KiB",
            resolution="is it the right file?",
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _invalid(path, [f"line {line}: not UTF-8 text"]) from None


def _parse(path: Path, text: str) -> tuple[Any, dict[KeyPath, int]]:
    """The file's content as plain data, and the line of each key path."""
    import yaml

    lines: dict[KeyPath, int] = {}
    problems: list[str] = []
    try:
        # Aliases have no use here, and nested ones expand without bound.
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                assert event.start_mark is not None
                line = event.start_mark.line + 1
                what = "an alias (a value that begins with * must be in quotes)"
                raise _invalid(path, [f"line {line}: {what}"])
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                raise _invalid(path, ["line 1: the file is empty"])
            _index(node, (), lines, problems)
            if problems:
                raise _invalid(path, problems)
            return loader.construct_document(node), lines
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"line {mark.line + 1}: "
        raise _invalid(path, [f"{where}{error.problem or error.context or 'not YAML'}"]) from None
    except yaml.YAMLError as error:
        raise _invalid(path, [str(error).splitlines()[0]]) from None
    except (ValueError, RecursionError) as error:
        # ValueError: YAML 1.1 reads 2024-99-99 as a date. RecursionError: thousands of brackets.
        raise _invalid(path, [f"not a policy: {type(error).__name__}: {error}"]) from None


def _index(node: yaml.Node, where: KeyPath, lines: dict[KeyPath, int], problems: list[str]) -> None:
    """Note the line of each key path; a key that is there twice is a problem (YAML would take the last)."""
    import yaml

    lines.setdefault(where, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _index(item, (*where, number), lines, problems)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else "?"
            line = key.start_mark.line + 1
            if name in seen:
                problems.append(f"line {line}: {_dotted((*where, name))}: already given in line {seen[name]}")
            seen[name] = line
            lines.setdefault((*where, name), line)
            _index(value, (*where, name), lines, problems)


def _problem(error: ErrorDetails, lines: dict[KeyPath, int]) -> str:
    """One of pydantic's findings as "line 7: sandbox.network.mode: …"."""
    where: KeyPath = tuple(part for part in error["loc"] if part != "[key]")
    known = where
    while known and known not in lines:
        known = known[:-1]
    if error["type"] == "extra_forbidden":
        parent = tuple(str(part) for part in where[:-1])
        text = "unknown key" + _suggestion(str(where[-1]), _KEYS.get(parent, ()))
    elif error["type"] == "literal_error":
        text = f"not a mode: {error['input']!r}" + _suggestion(str(error["input"]), _MODES)
    elif error["type"] == "string_pattern_mismatch":
        text = "may not have control characters"
    else:
        # The value is quoted only if it is short: it may be anything.
        shown = repr(error["input"])
        text = error["msg"] + (f", not {shown}" if len(shown) <= 60 and error["type"] != "missing" else "")
    return f"line {lines.get(known, 1)}: {_dotted(where)}: {text}"


def _suggestion(word: str, choices: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(word, choices, n=1)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (known here: {', '.join(choices)})" if choices else ""


def _dotted(where: KeyPath) -> str:
    dotted = ""
    for part in where:
        dotted += f"[{part}]" if isinstance(part, int) else f".{part}"
    return ascii(dotted.removeprefix("."))[1:-1] or "the file"


def _invalid(path: Path, problems: list[str]) -> UserInputError:
    return UserInputError(
        f"the policy {path} is not valid: {problems[0]}",
        details="\n".join(problems),
        resolution="correct the file; an example: sandbox: {filesystem: {denied_paths: [./secrets/]}}",
    )
