"""A review as one page that a person can hand to a colleague.

The page shows what a hostile guest wrote, in a browser that has the reader's cookies. So it is built as a tree of
elements (no text is ever joined into markup), has no script, loads nothing, and says so to the browser with a
Content-Security-Policy; every text of the guest goes through `shown` or `pieces_of`, and the size has a limit.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Iterable, Mapping
from importlib.resources import files

from vmsandbox.review.describe import (
    SORTS,
    grave,
    has_lines,
    label,
    said,
    size_text,
    sort_text,
    what_became,
    where_text,
)
from vmsandbox.review.text import shown, shown_bytes
from vmsandbox.review.values import Contents, FileChange, Finding, Review, Risk
from vmsandbox.review.visible import Piece, Row, changed_within, line_counts, pieces_of, rows_of

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_MAX_LISTED = 3000  # changes that are named
_MAX_SECTIONS = 600  # changes with a section of their own
_MAX_LINE = 1500  # characters of a line
_OPEN_ROWS = 400  # a section with more rows than this is closed at first
_ROW_COST = 240  # bytes of markup
_PIECE_COST = 40
_BUDGET = 6_000_000  # bytes of lines, about
_PATH = 400  # characters
_INLINE = frozenset(("span", "b", "a", "code", "mark", "td", "col"))


def as_html(review: Review, title: str, facts: Mapping[str, str], old: Contents, new: Contents) -> bytes:
    """The whole page (UTF-8). Beyond some megabytes, the content of less risky files is left out, and it says so.

    title: of the page, of the session for example. facts: name and value of what else is worth knowing; both may
    come from a guest. old, new: where the start of binary files is read.
    """
    html = ET.Element("html", lang="en")
    head = _add(html, "head")
    _add(head, "meta", charset="utf-8")
    ET.SubElement(head, "meta", {"http-equiv": "Content-Security-Policy", "content": _POLICY})
    ET.SubElement(head, "meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"})
    ET.SubElement(head, "meta", {"name": "referrer", "content": "no-referrer"})
    _add(head, "title", shown(title, 200))
    _add(head, "style", files("vmsandbox.review").joinpath("page.css").read_text("utf-8"))
    main = _add(_add(html, "body"), "main")
    _overview(main, review, title, facts)
    _contents(main, review)
    _Sections(main, new, old).add(review)
    footer = _add(main, "footer")
    footer.text = (
        "Characters that do not show as themselves (controls, direction marks, bytes that are no text) look like "
    )
    _add(footer, "span", "\\u202e", cls="odd").tail = ". Nothing on this page runs or is loaded. Made by vmsandbox."
    return b"<!DOCTYPE html>\n" + ET.tostring(html, encoding="unicode", method="html").encode() + b"\n"


def _add(parent: ET.Element, tag: str, text: str = "", cls: str = "", **attributes: str) -> ET.Element:
    """One element more, on a line of its own in the source. text: safe already, or the host's."""
    if cls:
        attributes["class"] = cls
    element = ET.SubElement(parent, tag, attributes)
    element.text = text or None
    if tag not in _INLINE:
        element.tail = "\n"
    return element


def _overview(main: ET.Element, review: Review, title: str, facts: Mapping[str, str]) -> None:
    header = _add(main, "header")
    _add(header, "p", "vmsandbox review", cls="kicker")
    _add(header, "h1", shown(title, 200))
    listed = _add(header, "dl", cls="facts")
    for name, value in (*facts.items(), ("reviewed tree", f"SHA-256 {review.digest}")):
        _add(listed, "dt", shown(name, 100))
        _add(listed, "dd", shown(value, 1000))
    counts = _add(header, "ul", cls="counts")
    for sort, name in SORTS.items():
        number = sum(1 for change in review.changes if change.sort == sort)
        if number:
            _add(_add(counts, "li"), "b", f"{number:,}").tail = name
    lines = [line_counts(change) for change in review.changes]
    if any(plus or minus for plus, minus in lines):
        _plus_minus(_add(counts, "li"), sum(plus for plus, _ in lines), sum(minus for _, minus in lines))
    if not review.changes:
        _add(_add(counts, "li"), "b", "nothing changed")
    if review.findings:
        section = _add(main, "section")
        _add(section, "h2", "About all of it")
        for finding in review.findings:
            bad = finding.blocks or grave(finding.risk)
            card = _add(section, "p", cls="card whole bad" if bad else "card whole")
            _badges(card, [finding])
            _last(card, said(finding))


def _contents(main: ET.Element, review: Review) -> None:
    """What to look at first, then every change by name."""
    by_risk: defaultdict[Risk, int] = defaultdict(int)
    for change in review.changes:
        for risk in {finding.risk for finding in change.findings}:
            by_risk[risk] += 1
    if by_risk or any(change.blocked for change in review.changes):
        section = _add(main, "section")
        _add(section, "h2", "Reasons to look")
        counts = _add(section, "ul", cls="badges")
        blocked = sum(1 for change in review.changes if change.blocked)
        if blocked:
            _add(_add(counts, "li"), "span", f"{blocked:,} × cannot be accepted", cls="badge blocked")
        for risk in Risk:
            if risk in by_risk:
                _add(_add(counts, "li"), "span", f"{by_risk[risk]:,} × {label(risk)}", cls=f"badge {_level(risk)}")
    if not review.changes:
        return
    section = _add(main, "section")
    _add(section, "h2", "Changes, the riskiest first")
    listed = _add(section, "ul", cls="card list")
    for number, change in enumerate(review.changes[:_MAX_LISTED]):
        line = _add(listed, "li")
        _add(line, "span", sort_text(change), cls="sort")
        name = _add(line, "span", cls="path")
        if number < _MAX_SECTIONS and not _is_plain_folder(change):
            _add(name, "a", _names(change), href=f"#c{number + 1}")
        else:
            name.text = _names(change)
        _plus_minus(_add(line, "span", cls="lines"), *line_counts(change))
        _badges(_add(line, "span"), change.findings)
    if len(review.changes) > _MAX_LISTED:
        _add(listed, "li", f"and {len(review.changes) - _MAX_LISTED:,} more, not on this page")


class _Sections:
    """Writes one section a change, until the page is large enough."""

    def __init__(self, main: ET.Element, new: Contents, old: Contents) -> None:
        self.main, self.new, self.old = main, new, old
        self.left = _BUDGET

    def add(self, review: Review) -> None:
        if review.changes:
            _add(self.main, "h2", "One by one")
        for number, change in enumerate(review.changes[:_MAX_SECTIONS], 1):
            if not _is_plain_folder(change):
                self._section(number, change)
        if len(review.changes) > _MAX_SECTIONS:
            more = len(review.changes) - _MAX_SECTIONS
            _add(self.main, "p", f"{more:,} more changes have no section of their own.", cls="card whole")

    def _section(self, number: int, change: FileChange) -> None:
        section = _add(self.main, "details", cls="card", id=f"c{number}")
        rows = sum(len(hunk.lines) for hunk in change.hunks or ())
        if change.findings or rows <= _OPEN_ROWS:
            section.set("open", "open")
        summary = _add(section, "summary")
        _add(summary, "span", _names(change), cls="path")
        _plus_minus(_add(summary, "span", cls="lines"), *line_counts(change))
        _badges(_add(summary, "span"), change.findings)
        _add(summary, "span", sort_text(change), cls="sort")
        if change.findings:
            reasons = _add(section, "ul", cls="reasons")
            for finding in change.findings:
                line = _add(reasons, "li")
                _badges(line, [finding])
                _last(line, (f"line {finding.line}: " if finding.line else "") + said(finding))
        self._facts(section, change)
        if change.hunks:
            self._table(section, change)

    def _facts(self, section: ET.Element, change: FileChange) -> None:
        for name, value in what_became(change):
            _add(_add(section, "p", f"{name}: ", cls="meta"), "code", value)
        if change.hunks is None:
            places = (("was", change.before, (self.old,)), ("is", change.after, (self.new, self.old)))
            for name, item, contents in places:
                if item and item.kind == "file" and item.sha256 and change.sort not in ("renamed", "mode_changed"):
                    text = f"{name} {size_text(item.size)}, starts with "
                    start = _start(contents, item.sha256)
                    if start is not None:
                        _add(_add(section, "p", text, cls="meta"), "code", shown_bytes(start, 160))

    def _table(self, section: ET.Element, change: FileChange) -> None:
        sides = (has_lines(change.before), has_lines(change.after))
        table = _add(section, "table", cls="diff")
        columns = _add(table, "colgroup")
        for _ in range(sum(sides)):
            _add(columns, "col", cls="num")
            _add(columns, "col")
        flagged = {finding.line for finding in change.findings}
        for hunk in change.hunks or ():
            span = {"colspan": str(2 * sum(sides))}
            where = where_text(hunk, sides[0], sides[1])
            _add(_add(table, "tr", cls="where"), "td", where, **span)
            for row in rows_of(hunk):
                if self.left <= 0:
                    cut = _add(_add(table, "tr", cls="where"), "td", **span)
                    cut.text = "The rest is not shown: this page is large enough. `vmsandbox changes --diff` has all."
                    return
                self._row(table, row, sides, flagged)

    def _row(self, table: ET.Element, row: Row, sides: tuple[bool, bool], flagged: Iterable[int | None]) -> None:
        marks: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
        if row.old is not None and row.new is not None and not row.same:
            marks = changed_within(row.old, row.new)
        line = _add(table, "tr", cls="ctx" if row.same else "")
        self.left -= _ROW_COST
        for present, number, content, marked, side, sign in (
            (sides[0], row.old_number, row.old, marks[0], "old", "del"),
            (sides[1], row.new_number, row.new, marks[1], "new", "add"),
        ):
            if not present:
                continue
            if content is None or number is None:
                _add(line, "td", cls=f"num {side} void")
                _add(line, "td", cls=f"{side} void")
                continue
            flag = " flag" if side == "new" and number in flagged else ""
            _add(line, "td", str(number), cls=f"num {side}{flag}")
            pieces = pieces_of(content, _MAX_LINE, marked)
            _fill(_add(line, "td", cls=f"{side} {'same' if row.same else sign}"), pieces)
            self.left -= sum(len(piece.text) + _PIECE_COST for piece in pieces)


def _fill(cell: ET.Element, pieces: list[Piece]) -> None:
    for text, look, new in pieces:
        if look == "plain" and not new:
            _last(cell, text)
            continue
        outer = _add(cell, "mark") if new else cell
        if look == "plain":
            outer.text = text
        else:
            _add(outer, "span", text, cls="odd" if look == "odd" else "note-in")


def _last(element: ET.Element, text: str) -> None:
    """Text after all that the element has so far."""
    if len(element):
        element[-1].tail = (element[-1].tail or "") + text
    else:
        element.text = (element.text or "") + text


def _badges(parent: ET.Element, findings: Iterable[Finding]) -> None:
    findings = list(findings)
    if any(finding.blocks for finding in findings):
        _add(parent, "span", "cannot be accepted", cls="badge blocked")
    present = {finding.risk for finding in findings}
    for risk in Risk:
        if risk in present:
            _add(parent, "span", label(risk), cls=f"badge {_level(risk)}").tail = " "


def _level(risk: Risk) -> str:
    if grave(risk):
        return "bad"
    return "note" if risk in (Risk.MODE, Risk.BINARY, Risk.DEPENDENCIES) else "warn"


def _is_plain_folder(change: FileChange) -> bool:
    """A new folder that there is nothing to say about: a line in the list is enough."""
    return change.sort == "added" and change.after is not None and change.after.kind == "dir" and not change.findings


def _names(change: FileChange) -> str:
    return (f"{shown(change.old_path, _PATH)} → " if change.old_path else "") + shown(change.path, _PATH)


def _plus_minus(parent: ET.Element, plus: int, minus: int) -> None:
    if plus:
        _add(parent, "span", f"+{plus:,}", cls="plus").tail = " "
    if minus:
        _add(parent, "span", f"−{minus:,}", cls="minus")


def _start(contents: tuple[Contents, ...], sha256: str) -> bytes | None:
    """The first bytes of a file. Only to be looked at: nothing is decided by them, so their digest is not checked."""
    for place in contents:
        if (stream := place.open(sha256)) is not None:
            with stream:
                return stream.read(16)
    return None
