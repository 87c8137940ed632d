"""What is in the lines that came: Unicode, terminal escapes, secrets, and rules that cannot be avoided."""

from __future__ import annotations

import re
import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judged import change_of, findings_in, judged, risks_in
from trees import File

from vmsandbox.review.linear import LinePattern, PatternSet
from vmsandbox.review.linear import one_line_end as searchable
from vmsandbox.review.rules import ReviewRules
from vmsandbox.review.rules_load import load_security_rules
from vmsandbox.review.scan import Added, Scanner, pieces
from vmsandbox.review.secret_shapes import redacted, secrets_in, shapes
from vmsandbox.review.unicode import suspicions
from vmsandbox.review.values import Risk

BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
NO_EVAL = ReviewRules(
    patterns=load_security_rules("r", b"rules: [{id: no-eval, pattern: '^eval\\(.*[)]$', severity: error}]")[0]
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("if level != 'user\u202e \u2066// admin\u2069 \u2066':", "right-to-left override"),
        ("a\u200bb", "zero width space"),
        ("a\u2060b", "word joiner"),
        ("a\u00adb", "soft hyphen"),
        ("x = '\u3164'", "hangul filler"),
        ("\u2800", "braille"),
        ("a\ufeffb", "does not show"),
        ("a\u200db", "does not show"),
        ("user\u200cname", "does not show"),
        ("var\u2028alert()", "does not show"),
        ("ok\U000e0049\U000e0067\U000e006e", "tag character"),
        ("\U0001f3f4\U000e0041\U000e0042 x", "tag character"),
        ("😀\ufe0f\ufe01\U000e0110\U000e0120", "variation selector"),
        ("x\ufe0f", "variation selector"),
        ("a\U000e0101", "variation selector"),
        ("\ue000", "private use"),
        ("\U00100000", "private use"),
        ("\ufdd0", "no character"),
        ("if (a\u01c3= b)", "looks like another sign"),
        ("a()\u037e", "looks like another sign"),
        ("pa\u0443pal = 1", "different alphabets"),
        ("\u0430dmin", "different alphabets"),
        ("sc\u03bfpe", "different alphabets"),
        ("a\u0301\u0441ess", "different alphabets"),
        ("\uff45xec()", "different alphabets"),
        ("g\u0585t", "different alphabets"),
        ("\uff45\uff58\uff45\uff43()", "styled letters"),
        ("\U0001d41e\U0001d42f\U0001d41a\U0001d425()", "styled letters"),
        ("\u0441\u043e\u0440\u0443 = 1  # copy", "passes for a Latin letter"),
        ("if \u0430 == admin:", "passes for a Latin"),
        ("import \u03bf\u03c5\u03c1", "passes for a Latin letter"),
    ],
)
def test_text_that_is_not_what_it_seems(text: str, says: str) -> None:
    found = [one for one in findings_in(f"first\nsecond\n{text}\n", "a.py") if one.risk is Risk.UNICODE]
    assert [one.line for one in found] == [3], found
    assert any(says in one.text for one in suspicions(f"second\n{text}\n"))
    assert not found[0].blocks


@pytest.mark.parametrize(
    "text",
    [
        "Привет, мир! IT-отдел, рост, хор и 3D-принтер",
        "# Автор: Иван <ivan@example.com>",
        "а",
        "Ολα καλά",
        "Δx = σ_max * μs",
        "λ = 3  # wave",
        "日本語のテキスト、ＰＤＦファイル",
        "中文，测试：Ａ；Ｂ（PDF）",
        "한국어 텍스트",
        "שלום עולם",
        "مرحبا بالعالم",
        "می‌خواهم",
        "क्‍ष हिन्दी",
        "ශ්‍රී",
        "naïve Ångström Straße œuvre ı İ ł",
        "e\u0301te\u0301",
        "Tiếng Việt",
        "Հայերեն",
        "👨\u200d👩\u200d👧 ❤\ufe0f 1\ufe0f\u20e3 👩🏽\u200d💻 ☎\ufe0f ©\ufe0f ↔\ufe0f ❤\ufe0f\u200d🔥 🏳\ufe0f\u200d🌈",
        "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
        "葛\U000e0100城",
        "“quotes” — ‘dash’… •  ½ €",
        "²³ H₂O ±2 °C × ÷ ≤ ≥ → ← ∑ ∫ √ ∞",
        "┌──┐ │ ░▒▓",
        "a\u00a0b",
        "ꜛ ɓ",
        "ไทย",
        "ქართული",
    ],
)
def test_text_in_any_language_raises_no_alarm(text: str) -> None:
    assert list(suspicions(text + "\n")) == []
    assert risks_in(f"x\n{text}\n") == set()


def test_a_byte_order_mark_belongs_at_the_start_of_a_file_only() -> None:
    assert risks_in("\ufeffusing System;\n", "a.cs") == set()
    assert risks_in("using System;\n\ufeffx\n", "a.cs") == {Risk.UNICODE}
    old, new = File(b"a\nb\n"), File("a\n\ufeffb\n".encode())
    assert Risk.UNICODE in {one.risk for one in change_of(judged({"x": old}, {"x": new}), "x").findings}


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80), st.sampled_from(BIDI), st.text(max_size=80), st.text(max_size=40))
def test_a_line_with_a_bidi_control_is_always_flagged(before: str, bidi: str, after: str, old: str) -> None:
    text = (before + bidi + after).encode("utf-8", "replace").decode().replace("\0", "")
    line = text[: text.index(next(one for one in text if one in BIDI))].count("\n") + 1
    assert (Risk.UNICODE, line) in {(one.risk, one.line) for one in findings_in(text + "\n")}
    was, now = {"x": File(old.encode("utf-8", "replace"))}, {"x": File(f"{text}\n".encode())}
    if bidi not in old and b"\0" not in was["x"].data:
        assert Risk.UNICODE in {one.risk for one in change_of(judged(was, now), "x").findings}


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(max_codepoint=0x24F, exclude_categories=("Cs", "Cc", "Cf", "Co", "Cn")), max_size=200))
def test_latin_text_is_never_suspicious(text: str) -> None:
    assert [one for one in suspicions(text) if not set("\u01c0\u01c3") & set(text)] == []


def test_every_character_that_formats_is_known() -> None:
    """All format characters of Unicode are flagged, but for those that show (signs before Arabic numbers)."""
    shows = {*range(0x600, 0x606), 0x6DD, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD}
    missed = [
        f"U+{code:04X}"
        for code in range(0x110000)
        if unicodedata.category(chr(code)) == "Cf" and code not in shows and not list(suspicions(f"x{chr(code)}x"))
    ]
    assert missed == []


def test_many_suspicious_lines_are_named_up_to_a_limit() -> None:
    found = findings_in("a\u202eb\n" * 1000 + "c\u202e" * 1000)
    assert [one.line for one in found] == [None, *range(1, 11)] and "more lines" in found[0].text


@pytest.mark.parametrize(
    "text",
    [
        "\x1b[2J",
        "\x1b]0;title\x07",
        "\x1b]52;c;aGk=\x1b\\",
        '\x1bP$q"p\x1b\\',
        "\x1b_x\x1b\\",
        "\x9b2J",
        "\x07",
        "a\bb",
        "x\ry",
        "real\r\rfake",
        "\x0e",
        "\x7f",
        "\x01",
        "\x0b",
        "\x85",
    ],
)
def test_what_a_terminal_acts_on_is_flagged(text: str) -> None:
    found = [one for one in findings_in(f"first\n{text}\nlast\n") if one.risk is Risk.TERMINAL]
    assert [one.line for one in found] == [2] and found[0].text.isprintable()


@pytest.mark.parametrize("text", ["a\tb\n", "a\r\nb\r\n", "x = 1\n\x0c\ny = 2\n", "no end", "\n\n", "é\r\nü\r\n"])
def test_line_ends_and_tabs_are_not(text: str) -> None:
    assert risks_in(text) == set()


def token(*parts: str) -> str:
    """Joined, so that nothing that looks for secrets stumbles over this file."""
    return "".join(parts)


R20, R36, R48 = (
    "q8Zk39fLmX0aPd7RtV2s",
    "q8Zk39fLmX0aPd7RtV2sUy4Hb6Nc1EwGjToQ",
    "q8Zk39fLmX0aPd7RtV2sUy4Hb6Nc1EwGjToQiK5vM3xDuYhA",
)
SECRETS = [
    token("AKIA", "Q3EGRZ7XJ2LMNP4A"),
    token("aws_secret_access_key = ", R20, R20),
    token("ghp_", R36),
    token("github_pat_", R36),
    token("glpat-", R20),
    token("xoxb-", "123456789012-123456789012-", R20),
    token("https://hooks.slack.com/services/", "T00000000/B00000000/", R36),
    token("sk_live_", R20),
    token("AIza", "SyA1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6q"),
    token("-----BEGIN RSA ", "PRIVATE KEY-----"),
    token("-----BEGIN OPENSSH ", "PRIVATE KEY-----"),
    token("-----BEGIN ", "PRIVATE KEY-----"),
    token("-----BEGIN PGP ", "PRIVATE KEY BLOCK-----"),
    token("eyJhbGciOiJIUzI1NiJ9.", "eyJzdWIiOiIxMjM0NTY3ODkwIn0.", R36),
    token("npm_", R36),
    token("//registry.npmjs.org/:_authToken=", R36),
    token("pypi-AgEIcHlwaS5vcmc", R48),
    token("sk-ant-", "api03-", R48),
    token("sk-proj-", R48),
    token("hf_", "abcdefghijklmnopqrstuvwxyzABCDEFGH"),
    token("SG.", R20, "aa.", R36, "abcdefg"),
    token("dckr_pat_", R36),
    token("hvs.", R36),
    token("sk-or-v1-", "0a1b2c3d" * 8),
    token("AccountKey=", "a" * 86, "=="),
    token("123456789:AA", R36[:33]),
    token("shpat_", "0a1b2c3d" * 4),
    token("postgres://user:", "hunter22x", "@db.example.com/x"),
    token("api_key = '", R20, "'"),
    token('"password": "', R20, '"'),
    token("export MY_SECRET_TOKEN=", R36),
    token("clientSecret: `", R36, "`"),
]


@pytest.mark.parametrize("secret", SECRETS)
def test_secrets_are_found_and_not_repeated(secret: str) -> None:
    found = [one for one in findings_in(f"a\nb\n  {secret}\nc\n", "a.cfg") if one.risk is Risk.SECRET]
    assert [one.line for one in found] == [3], found
    shown = found[0].text.rpartition(": ")[2]
    assert len(shown) == 5 and shown.endswith("…")
    for text in (f"x {secret}\n", f"a.cfg:3: {secret}"):
        assert any(one.begins == shown[:4] for one in secrets_in(text.encode(), 9))
        assert not any(value in redacted(text.encode()) for value in (R20, R36, "hunter22x", "0a1b2c3d", "a" * 86))


@pytest.mark.parametrize(
    "text",
    [
        'password = "changeme"',
        'token = os.environ["TOKEN"]',
        "secret = get_secret('name-of-the-secret-here')",
        'api_key = "your-api-key-goes-here-1"',
        'PASSWORD="${DB_PASSWORD_FROM_VAULT1}"',
        "https://example.com/a:b@c",
        "git@github.com:owner/repo.git",
        'token = "aaaaaaaaaaaaaaaaaaaaaaaa1"',
        "sha256:0a1b2c3d" * 4,
        "-----BEGIN CERTIFICATE-----",
        '"integrity": "sha512-q8Zk39fLmX0aPd7RtV2sUy4Hb6Nc1EwGjToQ=="',
        "def test_token_is_refreshed_when_expired(self):",
        "tokenizer = AutoTokenizer",
        "sk-learn",
        "password_field_placeholder_text = 'Enter your password'",
    ],
)
def test_what_merely_resembles_a_secret_is_not_one(text: str) -> None:
    assert risks_in(f"{text}\n", "a.py") == set()


def test_every_shape_compiles_and_has_a_name() -> None:
    assert len(shapes()) > 50 and all(shape.name for shape in shapes())
    assert all(not shape.pattern.matches(b"") for shape in shapes())


def test_samples_do_not_use_up_the_places_of_a_real_secret() -> None:
    real = f'password = "{R36}"\n'
    found = findings_in('password = "example-example-example"\n' * 5000 + real, "a.py")
    assert [(one.risk, one.line) for one in found] == [(Risk.SECRET, 5001)]


def test_one_secret_is_named_once_and_by_its_shape() -> None:
    found = findings_in(f'token = "{token("ghp_", R36)}"\n', "a.py")
    assert [one.text for one in found] == ["GitHub token: ghp_…"]


EVASIONS = [
    b"eval(x)",
    b"eval(x)\r\n",
    b"x\neval(x)",
    b"x = 1\reval(x)\ry",
    b"x\x0ceval(x)",
    b"x\x0beval(x)\n",
    "x\u2028eval(x)\u2029".encode(),
    "x\u0085eval(x)\n".encode(),
    b"ev\0al(x)",
    b"\xff\nval()\neval(\xe9)\n",
    b"\0\1\2\neval(x)\n",
    "\ufeffx\neval(x)".encode("utf-16"),
    "x\neval(x)\n".encode("utf-16-le"),
    b"# caf\xe9\neval(x)\n",
    b"x" * (5 << 20) + b"\neval(x)\n" + b"x" * 100,
    b"\n" * 70_000 + b"eval(x)\n",
]


@pytest.mark.parametrize("data", EVASIONS, ids=range(len(EVASIONS)))
def test_a_rule_that_forbids_is_not_avoided(data: bytes) -> None:
    assert change_of(judged({}, {"a.py": File(data)}, NO_EVAL), "a.py").blocked
    old = {"a.py": File(b"x\n")}
    assert change_of(judged(old, {"a.py": File(b"x\n" + data)}, NO_EVAL), "a.py").blocked


def test_patterns_see_one_line_at_a_time() -> None:
    assert not LinePattern(r"a\s+b").matches(b"a\nb")
    assert not LinePattern(r"a[^x]b").matches(b"a\nb") and not LinePattern("(?s)a.b").matches(b"a\nb")
    assert LinePattern(r"\Aa\z").matches(b"x\na\nb") and LinePattern("^a$").matches(b"x\na")
    assert [hit.start for hit in LinePattern("a").hits(b"aa\nb\nba")] == [0, 6]
    assert [hit.start for hit in LinePattern("$").hits(b"a\n\n")] == [1, 2, 3]
    with pytest.raises(ValueError, match=r"missing|unexpected"):
        LinePattern("a)|(b")


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(a|aa)+$", r"(.*a){20}b", r"(\w+\s?)+!"])
def test_patterns_take_linear_time(pattern: str) -> None:
    began = time.monotonic()
    assert not LinePattern(pattern).matches(b"a" * 2_000_000 + b"?")
    assert time.monotonic() - began < 5


def test_a_set_of_patterns_finds_what_each_finds_alone() -> None:
    patterns = [LinePattern(text) for text in ("^a", "b$", "(?i)c", "x|y", r"\bz\b")]
    data = b"ab\nC\nxz y\nz\nb\n"
    alone = {number: list(one.hits(data)) for number, one in enumerate(patterns) if one.matches(data)}
    assert {number: list(hits) for number, hits in PatternSet(patterns).hits(data)} == alone
    assert list(PatternSet(patterns).hits(b"q\n")) == [] and list(PatternSet([]).hits(data)) == []


@given(st.text(st.sampled_from("ab\n\r\u2028\u0085\x0c\x0bé"), max_size=40))
def test_other_line_ends_keep_their_place(text: str) -> None:
    data = text.encode()
    found = searchable(data)
    assert len(found) == len(data)
    assert [piece for piece in found.split(b"\n") if piece] == [
        piece.encode() for piece in re.split("[\n\r\x0b\x0c\u0085\u2028\u2029]", text) if piece
    ]


@given(st.lists(st.binary(max_size=40), max_size=20).map(b"\n".join))
def test_pieces_of_a_large_file_have_all_lines_with_their_numbers(data: bytes) -> None:
    seen = {}
    for piece, first in pieces(data, size=100_000):
        for number, line in enumerate(piece.split(b"\n"), first):
            seen.setdefault(number, line)
    assert [seen.get(number, b"") for number in range(1, data.count(b"\n") + 2)] == data.split(b"\n")
    long = b"x" * 250_000 + b"needle" + b"\n"
    assert sum(b"needle" in piece for piece, _ in pieces(long, size=100_000)) >= 1


def test_a_match_across_two_pieces_of_one_long_line_is_found() -> None:
    scanner = Scanner(load_security_rules("r", b"rules: [{id: x, pattern: needle, severity: error}]")[0], 10)
    for at in range(99_990, 100_010):
        long = b"x" * at + b"needle" + b"x" * 200_000
        assert any(scanner.patterns(Added(piece, first=first)) for piece, first in pieces(long, size=100_000))


def test_a_hundred_megabytes_take_seconds() -> None:
    """A tenth of it, against a tenth of the time."""
    text = b"".join(b"    value_%d = compute(argument, %d)  # a line like many others\n" % (n, n) for n in range(160))
    new = {f"d{number // 100}/f{number}.py": File(b"# %d\n" % number + text) for number in range(1000)}
    began = time.monotonic()
    found = judged({}, new, NO_EVAL)
    assert time.monotonic() - began < 6
    assert not [one for one in found.changes if one.findings]


def test_hostile_lines_take_no_longer_than_that() -> None:
    line = "password = 'x'\n\x1b[2J\nраypal \u202e \U000e0041\neval(x)\n" + 'token = "example-example-example"\n'
    new = {f"f{number}": File((f"{number}\n" + line * 100).encode()) for number in range(300)}
    began = time.monotonic()
    found = judged({}, new, NO_EVAL)
    assert time.monotonic() - began < 10
    assert all(one.blocked for one in found.changes)


def test_secrets_in_takes_only_so_many_of_a_shape() -> None:
    assert len(secrets_in((token("ghp_", R36) + "\n").encode() * 100, 7)) == 7
