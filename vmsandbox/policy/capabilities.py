"""The names of Linux capabilities (capabilities(7), linux/capability.h), as policies write them: lower case, no `cap_`.

Without the list a misspelt capability would be dropped nowhere and kept nowhere, and nobody would notice.
"""

from __future__ import annotations

CAPABILITIES = (
    "chown", "dac_override", "dac_read_search", "fowner", "fsetid", "kill", "setgid", "setuid", "setpcap",
    "linux_immutable", "net_bind_service", "net_broadcast", "net_admin", "net_raw", "ipc_lock", "ipc_owner",
    "sys_module", "sys_rawio", "sys_chroot", "sys_ptrace", "sys_pacct", "sys_admin", "sys_boot", "sys_nice",
    "sys_resource", "sys_time", "sys_tty_config", "mknod", "lease", "audit_write", "audit_control", "setfcap",
    "mac_override", "mac_admin", "syslog", "wake_alarm", "block_suspend", "audit_read", "perfmon", "bpf",
    "checkpoint_restore",
)  # fmt: skip


def capability(text: str) -> str | None:
    """`CAP_CHOWN`, `CHOWN` or `chown` as `chown`; None: there is no such capability."""
    name = text.lower().removeprefix("cap_")
    return name if name in CAPABILITIES else None
