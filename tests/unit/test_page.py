"""The page of a review: the same for the same review, inert in a real browser whatever a guest wrote, and it fits."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from reviewed import HOSTILE, NAME, NEW, OLD, example_review
from trees import File, Memory, Tree, review_of

from vmsandbox.review import page as page_module
from vmsandbox.review.page import as_html
from vmsandbox.review.values import Finding, Review, Risk

FACTS = {"session": "20260102-150405-demo-1a2b3c", "project": "/home/me/shop", "said <b>": "<i>\x1b[0m\u202e"}
# Everything that would make a browser do something: run, load, send, go elsewhere.
ACTIVE = {"script", "iframe", "object", "embed", "form", "input", "button", "img", "link", "base", "svg", "math",
          "audio", "video", "source", "template", "frame", "applet"}  # fmt: skip


def example() -> bytes:
    return as_html(example_review(), "Changes of </title><script>1</script> shop", FACTS, Memory(OLD), Memory(NEW))


def test_golden(golden: Callable[[str, str], None]) -> None:
    golden("review/page.html", example().decode())


class Parts(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str]] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update((name, value or "") for name, value in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_nothing_in_it_can_act() -> None:
    parts = Parts(example().decode())
    assert parts.tags.isdisjoint(ACTIVE)
    names = {name for name, _ in parts.attributes}
    assert names == {"lang", "charset", "http-equiv", "content", "name", "class", "href", "id", "open", "colspan"}
    assert all(re.fullmatch(r"#c\d+", value) for name, value in parts.attributes if name == "href")
    assert (
        "content",
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'",
    ) in parts.attributes
    assert "url(" not in example().decode() and "@import" not in example().decode()


def test_nothing_invisible_is_in_it() -> None:
    """The golden file could be written anew without anybody looking."""
    odd = {character for character in example().decode() if not character.isprintable()}
    assert odd == {"\n", "\t"}
    text = Parts(example().decode()).text
    for sample in (
        "<script>document.title='executed'</script>",
        "\\u202e",
        "\\x1b",
        "\\u009b",
        "\\u200b",
        "\\U000e0041",
        "e\u0301\u0301\u0301\\u0301",
    ):
        assert sample in text
    assert not set("\u202e\u2066\u2069\u200b\U000e0041") & set(text)


def test_findings_and_names_reach_it_safely_even_if_they_are_not() -> None:
    review = review_of(
        {}, {NAME: File(b"x\n")}, {NAME: (Finding(Risk.RULE, "\x1b<b>\u202e"),)}, (Finding(Risk.NAME, "\x1b"),)
    )
    text = as_html(review, "\x1b", {"\x1b": "\x1b"}, Memory(), Memory()).decode()
    assert all(character.isprintable() or character == "\n" for character in text)


def test_its_size_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    worst = b"\x01" * 1400 + b"\n"  # each character is shown as four
    new: Tree = {f"f{number}": File(worst * 2000) for number in range(12)} | {"last": File(b"x\n")}
    review = review_of({}, new)
    made = as_html(review, "large", {}, Memory(), Memory(new))
    assert len(made) < 2 * page_module._BUDGET
    assert b"this page is large enough" in made
    many = Review("0" * 64, review.changes * 800)
    monkeypatch.setattr(page_module, "_BUDGET", 0)
    made = as_html(many, "many", {}, Memory(), Memory(new))
    assert b"and 7,400 more, not on this page" in made and b"9,800 more changes have no section" in made
    assert len(made) < 4_000_000 and made.count(b"<li>") < 3100


def test_an_empty_review() -> None:
    text = Parts(as_html(Review("0" * 64), "t", {}, Memory(), Memory()).decode()).text
    assert "nothing changed" in text and "0" * 64 in text


@pytest.fixture(scope="module")
def browser() -> Iterator[Callable[..., bytes]]:
    """Runs Chromium on a page; returns what it wrote to stdout. It is needed: what a browser does is the point."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert program, "Chromium is not installed: apt-get install --no-install-recommends chromium"
    home = Path(tempfile.mkdtemp(prefix="vmsb-browser-"))

    def run(content: bytes, *options: str) -> bytes:
        page = home / "page.html"
        page.write_bytes(content)
        done = subprocess.run(
            [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
             "--disable-dev-shm-usage", f"--user-data-dir={home / 'profile'}", "--virtual-time-budget=2000",
             *options, page.as_uri()],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=False, cwd=home,
            env={"HOME": str(home), "PATH": "/usr/bin:/bin"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
        return done.stdout

    yield run
    shutil.rmtree(home, ignore_errors=True)


def test_a_browser_runs_nothing_of_it(browser: Callable[..., bytes]) -> None:
    dom = Parts(browser(example(), "--dump-dom").decode())
    assert dom.tags.isdisjoint(ACTIVE)
    assert not {name for name, _ in dom.attributes if name.startswith("on") or name in ("src", "style")}
    for line in HOSTILE[:4]:
        assert line in dom.text, "a hostile line is text, all of it"
    assert "executed" not in browser(example(), "--dump-dom").decode().partition("</title>")[0]


def test_the_browser_holds_to_the_policy(browser: Callable[..., bytes]) -> None:
    """If a tag did slip through: the policy stops it. And this test would see it run: without the policy it does."""
    planted = example().replace(b"</main>", b"<script>document.title='executed'</script></main>")
    assert b"<title>executed</title>" not in browser(planted, "--dump-dom")
    unprotected = planted.replace(b"Content-Security-Policy", b"X-Nothing")
    assert b"<title>executed</title>" in browser(unprotected, "--dump-dom")


# Measures itself: the page with its policy taken off, in a frame of the width that is asked for.
_MEASURE = """<!DOCTYPE html><title>waiting</title><iframe id="f" style="width:%dpx;height:900px;border:0"></iframe>
<script>const f = document.getElementById("f"); f.srcdoc = %s; f.onload = () => { const d = f.contentDocument;
const shown = [...d.querySelectorAll("table.diff td.add, table.diff td.del")].filter(e => e.getClientRects().length);
const wide = [...d.querySelectorAll("main *")].filter(e => e.getBoundingClientRect().right > %d + 1).length;
const font = d.defaultView.getComputedStyle(shown[0]).whiteSpace;
document.title = [d.documentElement.scrollWidth, wide, shown.length, font].join(" "); };</script>"""


@pytest.mark.parametrize("width", [1280, 480, 320])
def test_it_fits(browser: Callable[..., bytes], width: int) -> None:
    long: Tree = {
        "l" * 250 + "/" + "o" * 250: File(b"x" * 5000 + b"\n"),
        "w": File(b"\x1b" * 900 + "宽".encode() * 900 + b"\n"),
    }
    for content in (example(), as_html(review_of({}, long), "t" * 190, {"f" * 90: "v" * 900}, Memory(), Memory(long))):
        inner = json.dumps(content.decode().replace("Content-Security-Policy", "X-Nothing")).replace("<", "\\u003c")
        dom = browser(
            (_MEASURE % (width, inner, width)).encode(), "--dump-dom", f"--window-size={width + 100},1000"
        ).decode()
        title = re.search(r"<title>(.*?)</title>", dom)
        assert title
        scroll_width, wide, shown, white_space = title.group(1).split(" ", 3)
        assert int(scroll_width) <= width and wide == "0", "something sticks out"
        assert int(shown) > 1 and white_space.startswith("pre-wrap"), "the lines are there, with their spaces"


def test_it_can_be_seen(browser: Callable[..., bytes], tmp_path: Path) -> None:
    picture, paper = tmp_path / "page.png", tmp_path / "page.pdf"
    browser(example(), f"--screenshot={picture}", "--window-size=1280,1600")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 50_000  # a blank one has 10 kB
    browser(example(), f"--print-to-pdf={paper}")
    assert paper.read_bytes().startswith(b"%PDF") and paper.stat().st_size > 20_000
