"""Leaves QUIC and HTTP/3 out of the process: nothing here speaks them, and their imports take a fifth of the start.

mitmproxy's layers import them by name; they find classes of that name that nothing is an instance of.
"""

from __future__ import annotations

import sys
from types import ModuleType

_LEFT_OUT = {
    "mitmproxy.proxy.layers.quic": (
        "QuicStreamEvent", "ClientQuicLayer", "QuicStreamLayer", "RawQuicLayer", "ServerQuicLayer",
    ),
    "mitmproxy.proxy.layers.http._http3": ("Http3Client", "Http3Server"),
}  # fmt: skip


def leave_quic_out() -> None:
    """Has to come before anything of mitmproxy is imported."""
    for module, names in _LEFT_OUT.items():
        empty = ModuleType(module)
        for name in names:
            setattr(empty, name, type(name, (), {}))
        sys.modules[module] = empty
