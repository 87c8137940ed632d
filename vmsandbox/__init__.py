"""vmsandbox: throwaway QEMU/KVM guests for letting an AI coding agent work on a sensitive repository.

from vmsandbox import Sandbox

with Sandbox.open(project=".") as sb:
    status = sb.run(["pytest"])
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["Sandbox", "__version__"]


def __getattr__(name: str) -> Any:
    """Import `Sandbox` when it is asked for: commands such as `proxy` do without libvirt."""
    if name == "Sandbox":
        from vmsandbox.session.sandbox import Sandbox

        return Sandbox
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
