"""A project's own rules: read strictly, matched on added lines, run as commands elsewhere."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from judged import change_of, findings_in, judged
from trees import File, Tree

from vmsandbox.errors import UserInputError
from vmsandbox.policy.format.strictyaml import MAX_BYTES
from vmsandbox.review.rules import CommandRule, ReviewRules, command_findings
from vmsandbox.review.rules_load import load_risky_paths, load_security_rules
from vmsandbox.review.select import selection_of
from vmsandbox.review.values import Review, Risk
from vmsandbox.spec import Accept

# The format as users keep it.
EXAMPLE = rb"""rules:
  - id: no-hardcoded-secrets
    pattern: '(password|secret|key|token)\s*=\s*["''][^"'']+["'']'
    severity: error
    message: "no hard-coded secrets"
  - id: no-sql-injection
    pattern: 'execute\s*\(\s*["''].*%s'
    severity: error
    message: "possible SQL injection"
  - id: no-print
    pattern: 'print\('
    severity: warning
  - id: check-dependency-vulnerabilities
    command: "safety check"
    severity: warning
  - id: scan-for-secrets
    command: "git-secrets --scan"
    severity: error
"""


def rules(text: bytes = EXAMPLE) -> ReviewRules:
    patterns, commands = load_security_rules("rules.yaml", text)
    return ReviewRules(patterns, commands)


def test_the_format_as_users_keep_it() -> None:
    found = rules()
    assert [(one.id, one.severity, one.message) for one in found.patterns] == [
        ("no-hardcoded-secrets", "error", "no hard-coded secrets"),
        ("no-sql-injection", "error", "possible SQL injection"),
        ("no-print", "warning", "no message"),
    ]
    assert found.commands == (
        CommandRule("check-dependency-vulnerabilities", "safety check", "warning", "no message"),
        CommandRule("scan-for-secrets", "git-secrets --scan", "error", "no message"),
    )
    assert found.can_block and not ReviewRules().can_block


def test_error_blocks_and_warning_flags_on_added_lines_alone() -> None:
    old: Tree = {"a.py": File(b'key = "old"\nprint(1)\nx = 1\n'), "b.py": File(b"x\n")}
    new: Tree = {
        "a.py": File(b'key = "old"\nprint(1)\nx = 2\ntoken = "new"\nkey = "x" ; secret = "y"\n'),
        "b.py": File(b"x\nprint(2)\n"),
    }
    found = judged(old, new, rules())
    change = change_of(found, "a.py")
    assert [(one.line, one.blocks) for one in change.findings if one.risk is Risk.RULE] == [(4, True), (5, True)]
    assert change.findings[0].text == "rule no-hardcoded-secrets: no hard-coded secrets"
    assert change.blocked
    flagged = change_of(found, "b.py")
    assert [(one.risk, one.line, one.blocks) for one in flagged.findings] == [
        (Risk.RULE, 2, False)
    ] and not flagged.blocked
    assert [one.path for one in selection_of(found, Accept.ALL).choices] == ["b.py"]
    assert selection_of(found, Accept.SAFE).choices == ()


def test_rules_see_upper_and_lower_case_as_they_say() -> None:
    assert findings_in(b'KEY = "x"\n', "a", rules()) == ()
    insensitive = rules(EXAMPLE.replace(b"'(password", b"'(?i)(password"))
    assert [one.risk for one in findings_in(b'KEY = "x"\n', "a", insensitive)] == [Risk.RULE]


def test_many_matches_are_named_up_to_a_limit_and_block_all_the_same() -> None:
    found = [one for one in findings_in(b'key = "x"\n' * 1000, "a", rules()) if one.risk is Risk.RULE]
    assert [one.line for one in found] == [None, *range(1, 11)] and all(one.blocks for one in found)


@pytest.mark.parametrize("severity", ["error", "warning"])
def test_what_a_command_s_end_says(severity: str) -> None:
    rule = CommandRule("scan", "git-secrets --scan", severity, "no secrets")  # type: ignore[arg-type]
    assert command_findings(rule, 0, b"all is well") == ()
    secret = "ghp_" + "q8Zk39fLmX0aPd7RtV2sUy4Hb6Nc1EwGjToQ"
    for status in (1, 2, 137, -9, 255):
        (found,) = command_findings(rule, status, f"x\n\x1b[2J\xff found {secret} in a.py\n\n".encode())
        assert found.risk is Risk.RULE and found.blocks == (severity == "error") and found.line is None
        assert f"status {status}" in found.text and "in a.py" in found.text and "no secrets" in found.text
        assert found.text.isprintable() and "ghp_…" in found.text and secret not in found.text
    for status, says in ((127, "was not found"), (126, "could not be run")):
        (found,) = command_findings(rule, status, b"")
        assert says in found.text and "nothing is known" in found.text and found.blocks == (severity == "error")


def test_a_command_that_blocks_leaves_nothing_to_accept() -> None:
    found = judged({}, {"a": File(b"x")})
    with_rule = Review(found.digest, found.changes, command_findings(rules().commands[1], 1, b""))
    assert selection_of(found, Accept.ALL).choices and not selection_of(with_rule, Accept.ALL).choices


def test_the_end_of_a_flood_is_shown() -> None:
    (found,) = command_findings(rules().commands[0], 1, b"x" * 10_000_000 + b"\n" + b"y" * 10_000)
    assert len(found.text) < 500


def one(rule: str) -> bytes:
    return f"rules:\n  - {rule}\n".encode()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "line 1: the file is empty"),
        (b"rules:", "rules"),
        (b"[]", "the file"),
        (b"rules: {}", "line 1: rules:"),
        (b"rulez: []", "line 1: rulez: unknown key (did you mean 'rules'?)"),
        (one("{id: a, patern: x, severity: error}"), "line 2: rules[0].patern: unknown key (did you mean 'pattern'?)"),
        (
            one("{id: a, pattern: x, severity: eror}"),
            "rules[0].severity: not a severity: 'eror' (did you mean 'error'?)",
        ),
        (one("{id: a, pattern: x}"), "line 2: rules[0].severity: Field required"),
        (one("{pattern: x, severity: error}"), "rules[0].id: Field required"),
        (one("{id: a, severity: error}"), "rules[0]: a rule needs either `pattern` or `command`"),
        (one("{id: a, pattern: x, command: y, severity: error}"), "and not both"),
        (one("{id: a, pattern: '(?=x)', severity: error}"), "line 2: rules[0].pattern: not a pattern for RE2"),
        (one(r"{id: a, pattern: '(x)\1', severity: error}"), "invalid escape sequence"),
        (one("{id: a, pattern: '(', severity: error}"), "missing )"),
        (one("{id: a, pattern: 'a)|(b', severity: error}"), "rules[0].pattern"),
        (one("{id: a, pattern: 'x{2000}', severity: error}"), "repetition"),
        (one("{id: a, pattern: 'x*', severity: error}"), "it matches every line"),
        (one("{id: a, pattern: 1, severity: error}"), "rules[0].pattern"),
        (one("{id: 1, pattern: x, severity: error}"), "rules[0].id"),
        (one("{id: 'a b', pattern: x, severity: error}"), "rules[0].id"),
        (one('{id: a, command: "x\\ny", severity: error}'), "rules[0].command"),
        (one("{id: '', pattern: x, severity: error}"), "rules[0].id"),
        (
            one("{id: a, pattern: x, severity: error}\n  - {id: a, pattern: y, severity: error}"),
            "line 3: rules[1].id: 'a' is there twice",
        ),
        (one("{id: a, id: b, pattern: x, severity: error}"), "already given in line 2"),
        (b"rules:\n  - &a {id: a, pattern: x, severity: error}\n  - *a\n", "line 3: an alias"),
        (b"rules:\n  - id: a\n   x: y\n", "line 3:"),
        (b"\xff", "line 1: not UTF-8"),
        (b"#" * (MAX_BYTES + 1), "larger than"),
        (b"rules: [", "line 1: "),
        (b"rules: 2024-99-99", "not YAML"),
    ],
)
def test_a_wrong_file_says_where_and_what(content: bytes, says: str) -> None:
    with pytest.raises(UserInputError) as caught:
        load_security_rules("/project/.claude/security-rules.yaml", content)
    assert says in caught.value.brief, caught.value.brief
    assert "/project/.claude/security-rules.yaml" in caught.value.brief and "example" in caught.value.resolution


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(UserInputError) as caught:
        load_security_rules("x", b"rules:\n  - {id: a, pattern: x}\n  - {patern: x, id: b, command: y, severity: x}\n")
    assert len(caught.value.details.splitlines()) == 3


def test_an_example_in_an_error_is_right() -> None:
    with pytest.raises(UserInputError) as caught:
        load_security_rules("x", b"")
    load_security_rules("x", caught.value.resolution.partition("example: ")[2].encode())
    with pytest.raises(UserInputError) as caught:
        load_risky_paths("x", b"")
    load_risky_paths("x", caught.value.resolution.partition("example: ")[2].encode())


def test_risky_paths_of_a_person() -> None:
    found = load_risky_paths("x", b"risky_paths:\n  - reason: ours\n    paths: [deploy/, '*.sh']\n")
    assert [(one.pattern, one.reason) for one in found] == [("deploy/", "ours"), ("*.sh", "ours")]
    for content, says in [
        (b"risky_paths: [{reason: x, paths: ['!Makefile']}]", "nothing can be taken from the list"),
        (b"risky_paths: [{reason: x}]", "risky_paths[0].paths"),
        (b"risky_paths: [{reasn: x, paths: [a]}]", "did you mean 'reason'"),
        (b"risky_paths: [{reason: x, paths: []}]", "paths"),
        (b"rules: []", "risky_paths"),
    ]:
        with pytest.raises(UserInputError) as caught:
            load_risky_paths("mine.yaml", content)
        assert says in caught.value.details, caught.value.details


def test_the_built_in_list_is_in_the_format_of_a_person_s() -> None:
    from vmsandbox.review import risky

    content = Path(risky.__file__).with_name("risky_paths.yaml").read_bytes()
    assert load_risky_paths("built-in", content) == risky.built_in()


def test_a_review_without_rules_does_not_import_what_reads_them() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests/unit')\n"
        "from judged import findings_in; findings_in('x'); assert 'pydantic' not in sys.modules\n"
        "import vmsandbox.review.rules_load; assert 'pydantic' not in sys.modules"
    )
    assert shutil.which(sys.executable)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
