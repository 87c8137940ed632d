"""Reads a person's YAML file into a model, and says exactly where it is wrong.

Without the line, the key and a suggestion, a person whose file is refused would delete it. And YAML as such is too
kind for files that decide what is safe: it takes the last of two equal keys, and expands aliases without bound.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from vmsandbox.errors import UserInputError

if TYPE_CHECKING:
    import yaml
    from pydantic import BaseModel
    from pydantic_core import ErrorDetails

    Model = TypeVar("Model", bound=BaseModel)

MAX_BYTES = 256 * 1024

KeyPath = tuple[str | int, ...]


class StrictYaml:
    """One YAML file on its way to a model, with the line of each key.

    Args:
        title: what the file is called in errors.
        example: a right one, on one line.
        no_controls: what is said of a text that may not have control characters.
    """

    def __init__(
        self,
        title: str,
        example: str,
        no_controls: str = "may not have control characters",
    ) -> None:
        self._title, self._example, self._no_controls = title, example, no_controls
        self._keys: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._lines: dict[KeyPath, int] = {}

    @property
    def lines(self) -> Mapping[KeyPath, int]:
        """The line of each key and list entry that the file has, by the way to it."""
        return self._lines

    def read(self, content: bytes, model: type[Model]) -> Model:
        """Check a file's content (UTF-8, at most 256 KiB) against a pydantic model.

        Raises:
            UserInputError: all that is wrong, each with its line and key.
        """
        from pydantic import ValidationError

        if len(content) > MAX_BYTES:
            raise self.invalid([f"larger than {MAX_BYTES // 1024} KiB"])
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise self.invalid([f"line {line}: not UTF-8 text"]) from None
        data = self._parsed(text)
        self._keys = dict(_keys_of(model, ()))
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
        """The error that names these problems."""
        return UserInputError(
            f"{self._title} is not valid: {problems[0]}",
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
            text = "unknown key" + _suggestion(str(where[-1]), self._keys.get(parent, ()))
        elif error["type"] == "literal_error":
            # The values are those of the model: "'warn' or 'refuse'".
            known = tuple(re.findall(r"'([^']*)'", error.get("ctx", {}).get("expected", "")))
            text = f"not a {where[-1]}: {error['input']!r:.60}" + _suggestion(str(error["input"]), known)
        elif error["type"] == "string_pattern_mismatch":
            text = self._no_controls
        elif error["type"] == "value_error":
            text = error["msg"].removeprefix("Value error, ")
        else:
            # The value is quoted only if it is short: it may be anything.
            shown = repr(error["input"])
            text = error["msg"] + (f", not {shown}" if len(shown) <= 60 and error["type"] != "missing" else "")
        return self.at(where, text)


def _keys_of(model: type[BaseModel], where: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """The keys of each mapping of a model, by the way to it without list indexes."""
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    yield where, tuple(fields)
    for name, field in fields.items():
        for inner in _models_in(field.annotation):
            yield from _keys_of(inner, (*where, name))


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if hasattr(annotation, "model_fields"):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


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
