"""Reads the files that people write for reviews, and says exactly where they are wrong.

Without the line, the key and a suggestion, a person whose rules are refused would delete the rules.

Both functions take bytes: where those come from matters more than anything in them. Security rules must be the
host's own, as they were before the session: a guest that may change the rules is judged by none.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, TypeVar

from vmsandbox.errors import UserInputError
from vmsandbox.review.linear import LinePattern
from vmsandbox.review.rules import CommandRule, PatternRule, RiskyPath

if TYPE_CHECKING:
    import yaml
    from pydantic import BaseModel
    from pydantic_core import ErrorDetails

    Model = TypeVar("Model", bound=BaseModel)

MAX_BYTES = 256 * 1024
_KEYS: dict[tuple[str, ...], tuple[str, ...]] = {
    (): ("rules", "risky_paths"),
    ("rules",): ("id", "pattern", "command", "severity", "message"),
    ("risky_paths",): ("reason", "paths"),
}
_SEVERITIES = ("error", "warning")
_RULES_EXAMPLE = "rules: [{id: no-eval, pattern: 'eval\\(', severity: error, message: no eval}]"
_PATHS_EXAMPLE = "risky_paths: [{reason: run by our deployment, paths: [deploy/**]}]"

KeyPath = tuple[str | int, ...]


def load_security_rules(source: str, content: bytes) -> tuple[tuple[PatternRule, ...], tuple[CommandRule, ...]]:
    """The rules of a `.claude/security-rules.yaml` (at most 256 KiB).

    Args:
        source: what the file is called in errors.
        content: the file as it was on the host when the session began.

    Raises:
        UserInputError: not such a file, an id that is there twice, or a pattern that cannot be matched in linear time;
            names the file, the line and the key.
    """
    from vmsandbox.review.rules_model import SecurityRulesFile

    reader = _Reader(source, _RULES_EXAMPLE)
    model = reader.read(content, SecurityRulesFile)
    patterns: list[PatternRule] = []
    commands: list[CommandRule] = []
    seen: set[str] = set()
    for number, rule in enumerate(model.rules):
        if rule.id in seen:
            raise reader.invalid([reader.at(("rules", number, "id"), f"{rule.id!r} is there twice")])
        seen.add(rule.id)
        message = rule.message or "no message"
        if rule.command is not None:
            commands.append(CommandRule(rule.id, rule.command, rule.severity, message))
            continue
        assert rule.pattern is not None
        try:
            pattern = LinePattern(rule.pattern)
        except ValueError as error:
            why = f"not a pattern for RE2, which has no look-around and no back references: {error}"
            raise reader.invalid([reader.at(("rules", number, "pattern"), why)]) from None
        if pattern.matches(b"") and pattern.matches(b"x"):
            raise reader.invalid([reader.at(("rules", number, "pattern"), "it matches every line")])
        patterns.append(PatternRule(rule.id, pattern, rule.severity, message))
    return tuple(patterns), tuple(commands)


def load_risky_paths(source: str, content: bytes) -> tuple[RiskyPath, ...]:
    """A person's additions to the built-in list, in its format (see `risky_paths.yaml`).

    Raises:
        UserInputError: not such a file; names the file, the line and the key.
    """
    from vmsandbox.review.rules_model import RiskyPathsFile

    reader = _Reader(source, _PATHS_EXAMPLE)
    model = reader.read(content, RiskyPathsFile)
    found: list[RiskyPath] = []
    for number, group in enumerate(model.risky_paths):
        for place, path in enumerate(group.paths):
            if path.startswith("!"):
                why = "nothing can be taken from the list (a name that begins with ! is written [!])"
                raise reader.invalid([reader.at(("risky_paths", number, "paths", place), why)])
            found.append(RiskyPath(path, group.reason))
    return tuple(found)


class _Reader:
    """One YAML file on its way to a model, with the line of each key."""

    def __init__(self, source: str, example: str) -> None:
        self._source, self._example = source, example
        self._lines: dict[KeyPath, int] = {}

    def read(self, content: bytes, model: type[Model]) -> Model:
        from pydantic import ValidationError

        if len(content) > MAX_BYTES:
            raise self.invalid([f"larger than {MAX_BYTES // 1024} KiB"])
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise self.invalid([f"line {line}: not UTF-8 text"]) from None
        data = self._parsed(text)
        try:
            return model.model_validate(data)
        except ValidationError as error:
            # A misspelt key is why another is missing: it goes first.
            found = sorted(error.errors(include_url=False), key=lambda one: one["type"] == "missing")
            raise self.invalid([self._problem(one) for one in found]) from None

    def at(self, where: KeyPath, text: str) -> str:
        """A problem with its place: "line 7: rules[0].pattern: …"."""
        known = where
        while known and known not in self._lines:
            known = known[:-1]
        return f"line {self._lines.get(known, 1)}: {_dotted(where)}: {text}"

    def invalid(self, problems: list[str]) -> UserInputError:
        return UserInputError(
            f"{self._source} is not valid: {problems[0]}",
            details="\n".join(problems),
            resolution=f"correct the file; an example: {self._example}",
        )

    def _parsed(self, text: str) -> Any:
        import yaml

        problems: list[str] = []
        try:
            # Aliases have no use here, and nested ones expand without bound.
            for event in yaml.parse(text, Loader=yaml.SafeLoader):
                if isinstance(event, yaml.AliasEvent):
                    assert event.start_mark is not None
                    what = "an alias (a value that begins with * must be in quotes)"
                    raise self.invalid([f"line {event.start_mark.line + 1}: {what}"])
            loader = yaml.SafeLoader(text)
            try:
                node = loader.get_single_node()
                if node is None:
                    raise self.invalid(["line 1: the file is empty"])
                self._index(node, (), problems)
                if problems:
                    raise self.invalid(problems)
                return loader.construct_document(node)
            finally:
                loader.dispose()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = "" if mark is None else f"line {mark.line + 1}: "
            raise self.invalid([f"{where}{error.problem or error.context or 'not YAML'}"]) from None
        except yaml.YAMLError as error:
            raise self.invalid([str(error).splitlines()[0]]) from None
        except (ValueError, RecursionError) as error:
            raise self.invalid([f"not YAML: {type(error).__name__}: {error}"]) from None

    def _index(self, node: yaml.Node, where: KeyPath, problems: list[str]) -> None:
        """Note the line of each key path; a key that is there twice is a problem (YAML would take the last)."""
        import yaml

        self._lines.setdefault(where, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            for number, item in enumerate(node.value):
                self._index(item, (*where, number), problems)
        elif isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key, value in node.value:
                name = key.value if isinstance(key, yaml.ScalarNode) else "?"
                line = key.start_mark.line + 1
                if name in seen:
                    problems.append(f"line {line}: {_dotted((*where, name))}: already given in line {seen[name]}")
                seen[name] = line
                self._lines.setdefault((*where, name), line)
                self._index(value, (*where, name), problems)

    def _problem(self, error: ErrorDetails) -> str:
        where: KeyPath = tuple(part for part in error["loc"] if part != "[key]")
        if error["type"] == "extra_forbidden":
            parent = tuple(str(part) for part in where[:-1] if not isinstance(part, int))
            text = "unknown key" + _suggestion(str(where[-1]), _KEYS.get(parent, ()))
        elif error["type"] == "literal_error":
            text = f"not a severity: {error['input']!r:.60}" + _suggestion(str(error["input"]), _SEVERITIES)
        elif error["type"] == "string_pattern_mismatch":
            text = "may not have control characters (an id: no spaces either)"
        elif error["type"] == "value_error":
            text = error["msg"].removeprefix("Value error, ")
        else:
            shown = repr(error["input"])
            text = error["msg"] + (f", not {shown}" if len(shown) <= 60 and error["type"] != "missing" else "")
        return self.at(where, text)


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
