"""What every part of a policy file is made of. Imports pydantic: see `model.py`.

Without one base, a section could forget to be strict, and take a misspelt key for nothing.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, StringConstraints


def blank_is_empty(value: object) -> object:
    """`allowed_hosts:` with nothing behind it means an empty list: for an allow-list that denies all."""
    return [] if value is None else value


def blank_is_default(value: object) -> object:
    """A section with nothing in it is as if it was not there."""
    return {} if value is None else value


# No control characters: no path, host or command here needs one, and they would reach terminals and logs.
Text = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f]+$")]
Texts = Annotated[list[Text], BeforeValidator(blank_is_empty)]


class Strict(BaseModel):
    """No unknown keys, no conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
