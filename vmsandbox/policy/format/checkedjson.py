"""A person's JSON file, read strictly: every problem is gathered and named by its place in the file.

Without it each reader of JSON would stop at the first problem, take the last of two equal keys, or be halted by a
file that is nested without end.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from typing import Any

from vmsandbox.errors import UserInputError

MAX_BYTES = 256 * 1024


class CheckedJson:
    """One JSON file on its way to a value.

    Args:
        title: what the file is called in errors.
        resolution: what to do about a wrong one.

    problems: what is wrong so far, each with its place. notes: what has no effect.
    """

    def __init__(self, title: str, resolution: str) -> None:
        self._title, self._resolution = title, resolution
        self.problems: list[str] = []
        self.notes: list[str] = []

    def parsed(self, text: str) -> Any:
        if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
            raise self.invalid(f"larger than {MAX_BYTES // 1024} KiB")

        def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
            found = dict(items)
            for name, times in Counter(name for name, _ in items).items() if len(found) < len(items) else ():
                if times > 1:
                    self.problem("", f"the key {shown(name)} is given twice")
            return found

        try:
            return json.loads(text, object_pairs_hook=pairs)
        except json.JSONDecodeError as error:
            raise self.invalid(f"line {error.lineno}: not JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:
            raise self.invalid(f"not JSON: {type(error).__name__}") from None

    def mapping(self, value: Any, at: str, known: tuple[str, ...]) -> bool:
        if not isinstance(value, dict):
            self.problem(at, "not a JSON object")
            return False
        for key in value:
            if key not in known:
                self.problem(f"{at}.{shown(key)[1:-1]}".lstrip("."), f"unknown key{self.close(key, known)}")
        return True

    def items(self, holder: dict[str, Any], at: str, key: str) -> list[Any]:
        value = holder.get(key)
        if value is not None and not isinstance(value, list):
            self.problem(f"{at}{key}", "not a list")
        return value if isinstance(value, list) else []

    def one_of(self, value: Any, at: str, what: str, known: tuple[str, ...]) -> bool:
        if isinstance(value, str) and value in known:
            return True
        self.problem(at, f"unknown {what} {shown(value)}{self.close(value, known)}")
        return False

    def close(self, value: object, known: tuple[str, ...]) -> str:
        """What may have been meant; not for file after file of nonsense: a comparison takes its time."""
        if not isinstance(value, str) or len(value) > 64 or len(self.problems) + len(self.notes) > 20:
            return ""
        close = difflib.get_close_matches(value, known, n=1)
        return f" (did you mean {close[0]}?)" if close else ""

    def problem(self, at: str, text: str) -> None:
        self.problems.append(f"{at}: {text}" if at else text)

    def invalid(self, *more: str) -> UserInputError:
        problems = [*self.problems, *more]
        return UserInputError(
            f"{self._title} is not valid: {problems[0]}",
            details="\n".join(problems[:50]),
            resolution=self._resolution,
        )


def shown(value: object) -> str:
    return ascii(value)[:60]
