"""What every part of a policy file is made of. Imports pydantic: see `model.py`.

Without one base, a section could forget to be strict, and take a misspelt key for nothing.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, WithJsonSchema

from vmsandbox.policy.format import words


def blank_is_empty(value: object) -> object:
    """`allowed_hosts:` with nothing behind it means an empty list: for an allow-list that denies all."""
    return [] if value is None else value


def blank_is_default(value: object) -> object:
    """A section with nothing in it is as if it was not there."""
    return {} if value is None else value


def not_empty(value: object) -> object:
    """For lists of which none at all means "any": a blank one would allow what it looks like it denies."""
    if value in (None, []):
        raise ValueError("an empty list would not mean none: leave the key away, or name something")
    return value


def one_or_more(value: object) -> object:
    """A text alone is a list of one."""
    return [value] if isinstance(value, str) else value


def described(text: str, **more: Any) -> Any:
    """A key that may be left out (then it is None, or what `default` or `default_factory` says), with its description
    for `policy schema`.
    """
    if "default_factory" not in more:
        more.setdefault("default", None)
    return Field(description=text, **more)


# No control characters: no path, host or command here needs one, and they would reach terminals and logs.
Text = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f]+$")]
Texts = Annotated[list[Text], BeforeValidator(blank_is_empty)]
Size = Annotated[
    int,
    BeforeValidator(words.size),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 0},
                {"type": "string", "pattern": "^[0-9.]+ ?([kKmMgGtT]([iI]?[bB])?|[bB])?$"},
            ]
        }
    ),
]
Duration = Annotated[
    float,
    BeforeValidator(words.duration),
    WithJsonSchema(
        {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string", "pattern": "^([0-9.]+[smhd])+$"}]}
    ),
]
Command = Annotated[
    list[Text],
    BeforeValidator(words.program),
    Field(min_length=1, max_length=256),
    WithJsonSchema(
        {"anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
    ),
]
GuestPath = Annotated[Text, AfterValidator(words.guest_path)]
DeniedPath = Annotated[Text, AfterValidator(words.denied_path)]
MAX_ENTRIES = 2000


class Strict(BaseModel):
    """No unknown keys, no conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
