"""Reads the files that people write for reviews, and says exactly where they are wrong.

Without the line, the key and a suggestion, a person whose rules are refused would delete the rules.

Both functions take bytes: where those come from matters more than anything in them. Security rules must be the
host's own, as they were before the session: a guest that may change the rules is judged by none.
"""

from __future__ import annotations

from vmsandbox.policy.format.strictyaml import StrictYaml
from vmsandbox.review.linear import LinePattern
from vmsandbox.review.rules import CommandRule, PatternRule, RiskyPath

_RULES_EXAMPLE = "rules: [{id: no-eval, pattern: 'eval\\(', severity: error, message: no eval}]"
_PATHS_EXAMPLE = "risky_paths: [{reason: run by our deployment, paths: [deploy/**]}]"


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

    reader = _reader(source, _RULES_EXAMPLE)
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

    reader = _reader(source, _PATHS_EXAMPLE)
    model = reader.read(content, RiskyPathsFile)
    found: list[RiskyPath] = []
    for number, group in enumerate(model.risky_paths):
        for place, path in enumerate(group.paths):
            if path.startswith("!"):
                why = "nothing can be taken from the list (a name that begins with ! is written [!])"
                raise reader.invalid([reader.at(("risky_paths", number, "paths", place), why)])
            found.append(RiskyPath(path, group.reason))
    return tuple(found)


def _reader(source: str, example: str) -> StrictYaml:
    no_controls = "may not have control characters (an id: no spaces either)"
    return StrictYaml(source, example, no_controls)
