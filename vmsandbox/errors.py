"""Errors that a person can act on: what happened, the evidence, what to do.

Without this module every layer would invent its own message style and exit status. The shape (brief, details,
resolution) is what the terminal prints; `exit_code` is what the process returns (the contract: 125 is
vmsandbox's own failure, 126 a refusal by policy, 130/143 an interruption).
"""

from __future__ import annotations

EXIT_OWN_FAILURE = 125
EXIT_REFUSED = 126


class VmsandboxError(Exception):
    """Base of every error that vmsandbox raises on purpose.

    Args:
        brief: one line: what happened.
        details: the evidence: a program's last words, a path, a value. May have several lines.
        resolution: what the person can do about it.
    """

    exit_code = EXIT_OWN_FAILURE

    def __init__(self, brief: str, *, details: str = "", resolution: str = "") -> None:
        super().__init__(brief)
        self.brief = brief
        self.details = details
        self.resolution = resolution

    def as_json(self) -> dict[str, str]:
        """The same three parts for `--json`."""
        return {
            "error": type(self).__name__,
            "brief": self.brief,
            "details": self.details,
            "resolution": self.resolution,
        }


class UserInputError(VmsandboxError):
    """The person's fault: a path, name, option or file of theirs is wrong."""


class HostError(VmsandboxError):
    """The host's fault: a program, permission, daemon or space is missing."""


class ImageError(VmsandboxError):
    """An image is missing, damaged, or could not be built."""


class GuestError(VmsandboxError):
    """The guest's fault: it did not come up, went away, or sent what it may not send."""


class RefusedError(VmsandboxError):
    """vmsandbox refuses on purpose: policy, isolation grade or a foreign device."""

    exit_code = EXIT_REFUSED


class JournalError(VmsandboxError):
    """A journal's chain is broken, or it cannot be written."""
