"""The exact shapes of the files that people write for reviews. Importing this costs about 0.1 s (pydantic): only
`rules_load.py` does, when there is such a file.

Without a strict model a misspelt `patern:` would be a rule that never matches.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

_Text = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f]+$")]
_Id = Annotated[str, StringConstraints(min_length=1, max_length=80, pattern=r"^[^\x00-\x20\x7f]+$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class SecurityRule(_Strict):
    """A pattern or a command, exactly one of them."""

    id: _Id
    pattern: Annotated[str, StringConstraints(min_length=1, max_length=4096)] | None = None
    command: _Text | None = None
    severity: Literal["error", "warning"]
    message: _Text | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> SecurityRule:
        if (self.pattern is None) == (self.command is None):
            raise ValueError("a rule needs either `pattern` or `command`, and not both")
        return self


class SecurityRulesFile(_Strict):
    """`.claude/security-rules.yaml`."""

    rules: Annotated[list[SecurityRule], Field(max_length=1000)]


class RiskyPathGroup(_Strict):
    """Paths that matter for one reason."""

    reason: _Text
    paths: Annotated[list[_Text], Field(min_length=1, max_length=1000)]


class RiskyPathsFile(_Strict):
    """The built-in list, and a person's additions to it."""

    risky_paths: Annotated[list[RiskyPathGroup], Field(max_length=1000)]
