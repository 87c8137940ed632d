r"""The staging folder's journal: what is about to be done, written down before the first name changes.

Without it nobody could tell, after a crash, which names were changed and what they named before.

`.vmsandbox-apply-<16 hex>/` lies in the project's root (0700), so that a rename reaches everything:

    new/<number>    what will be put in place; after an exchange, what was there
    old/<number>    what was moved out
    and the journal, whose *name* says how far it came (each change of it is one rename, made durable):
    journal.part    nothing of the project was changed: the folder is rubbish
    journal         the steps may have been done in part: they are undone, last one first
    done            all steps were done and are durable: the folder is rubbish
    undone          all steps were undone and that is durable: the folder is rubbish

The journal is JSON lines in ASCII, version 1:

    {"vmsandbox-apply":1,"label":"…"}
    {"number":0,"act":"swap","path":"a","before":{"kind":"file","mode":420,"size":3,"sha256":"…"},"after":{…},"was":0}
    {"steps":1,"sha256":"… of all lines before this one …"}

Only undoing is written down, not redoing: there is one way back to a whole tree, tried at every step, and
the new bytes are in quarantine still, from where they can be accepted again. A journal that is damaged or of a version
that is not known is an error and never a reason to remove anything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from vmsandbox.apply.plan import Step, is_forbidden_name
from vmsandbox.review.manifest import Item, checked_path

VERSION = 1
_ACTS = ("out", "in", "swap", "mode")


def written(label: str, steps: Sequence[Step]) -> bytes:
    """The journal's bytes."""
    lines = [_line({"vmsandbox-apply": VERSION, "label": label})]
    for step in steps:
        record = step._asdict()
        record["before"] = step.before and step.before._asdict()
        record["after"] = step.after and step.after._asdict()
        lines.append(_line(record))
    body = b"".join(lines)
    return body + _line({"steps": len(steps), "sha256": hashlib.sha256(body).hexdigest()})


def parsed(content: bytes) -> tuple[str, list[Step]]:
    """The label and the steps.

    Raises:
        ValueError: it is not exactly what `written` writes, with why.
    """
    try:
        lines = content.splitlines(keepends=True)
        head, last = json.loads(lines[0]), json.loads(lines[-1])
        if head["vmsandbox-apply"] != VERSION:
            raise ValueError(f"its version is {head['vmsandbox-apply']!r}; this vmsandbox knows {VERSION}")
        body = b"".join(lines[:-1])
        if last != {"steps": len(lines) - 2, "sha256": hashlib.sha256(body).hexdigest()}:
            raise ValueError("it is damaged: its digest is another")
        return str(head["label"]), [_step(json.loads(line)) for line in lines[1:-1]]
    except (LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"it is damaged: {type(error).__name__}") from None


def _step(record: dict[str, Any]) -> Step:
    before, after = (Item(**record[key]) if record[key] else None for key in ("before", "after"))
    step = Step(int(record["number"]), record["act"], record["path"], before, after, int(record["was"]))
    # A project may come with such a folder planted in it: what it says is judged like any other path.
    path = checked_path(step.path, 128)
    if step.act not in _ACTS or any(is_forbidden_name(name) for name in path.split("/")):
        raise ValueError("it names what is never written to")
    return step


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode("ascii") + b"\n"
