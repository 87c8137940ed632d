"""The network broker's own Python environment.

Without the check, the first session with a network would be the one that waits for it to be installed.
"""

from __future__ import annotations

import importlib.util

from vmsandbox.broker.environment import find_environment, make_environment
from vmsandbox.monitor import Monitor
from vmsandbox.session.checks import CheckResult, Examined, Status, install_line

_TITLE = "network broker"


def check_broker(host: Examined) -> list[CheckResult]:
    """Whether the environment is there; a session without a network runs without it."""
    found = find_environment(host.layout)
    if found is not None:
        return [CheckResult("broker", _TITLE, Status.OK, str(found))]
    missing = "not made yet: the first session with a network does it (a minute)"
    if importlib.util.find_spec("ensurepip") is None:
        packages = ("python3-venv",)
        return [
            CheckResult("broker", _TITLE, Status.WARN, f"{missing}, and needs venv", install_line(packages), packages)
        ]

    def make() -> str:
        return f"made {make_environment(host.layout, host.programs, Monitor())}"

    return [CheckResult("broker", _TITLE, Status.WARN, missing, "vmsandbox doctor --fix", fix=make)]
