"""The one module that talks to libvirt. Everything above sees plain values and VmsandboxError.

libvirt's own exceptions carry an English sentence and a code; here they become errors that say what to do.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import libvirt
import libvirt_qemu

from vmsandbox.errors import HostError

T = TypeVar("T")

# libvirt prints every error to stderr unless told otherwise; ours go through VmsandboxError.
libvirt.registerErrorHandler(lambda _context, _error: None, None)


def default_uri() -> str:
    """`qemu:///system` for root, `qemu:///session` (its own libvirtd) for everyone else."""
    return os.environ.get("VMSANDBOX_LIBVIRT_URI") or ("qemu:///system" if os.geteuid() == 0 else "qemu:///session")


@dataclass(frozen=True)
class Running:
    """A domain of ours that libvirt runs: its name and UUID, and the session id and home in its metadata."""

    name: str
    uuid: str
    session_id: str
    home: str


class Host:
    """A connection to libvirt on this machine."""

    def __init__(self, uri: str, connection: Any) -> None:
        self.uri = uri
        self._connection = connection

    @classmethod
    def open(cls, uri: str | None = None) -> Host:
        """Connect; a daemon that is being restarted gets a second. Raises HostError with the way to start it."""
        where = uri or default_uri()
        try:
            return cls(where, _open_patiently(where))
        except libvirt.libvirtError as error:
            raise HostError(
                f"libvirt does not answer at {where}",
                details=str(error),
                resolution="`vmsandbox doctor --fix` starts its daemon (or: systemctl start libvirtd; "
                "without systemd: virtlogd -d; libvirtd -d)",
            ) from error

    def close(self) -> None:
        """End the connection; domains go on."""
        self._connection.close()

    # -- what this host is ---------------------------------------------------------------------------------

    @cached_property
    def qemu_version(self) -> tuple[int, int, int]:
        """QEMU's version as libvirt sees it."""
        number = self._connection.getVersion()
        return number // 1_000_000, number // 1000 % 1000, number % 1000

    @cached_property
    def libvirt_version(self) -> tuple[int, int, int]:
        """The daemon's version."""
        number = self._connection.getLibVersion()
        return number // 1_000_000, number // 1000 % 1000, number % 1000

    def emulator_and_machine(self, domain_type: str, machine: str) -> tuple[str, str]:
        """The emulator's path and the full machine type ("pc-q35-7.2") for `qemu` or `kvm` and an alias."""
        xml = self._call(
            "asking libvirt for its machine types",
            lambda: self._connection.getDomainCapabilities(None, "x86_64", machine, domain_type, 0),
        )
        tree = ET.fromstring(xml)  # noqa: S314 - from the trusted daemon
        return tree.findtext("path", ""), tree.findtext("machine", "")

    @cached_property
    def _security_models(self) -> list[ET.Element]:
        tree = ET.fromstring(self._connection.getCapabilities())  # noqa: S314 - from the trusted daemon
        return tree.findall("host/secmodel")

    @property
    def confined_by_mac(self) -> bool:
        """Whether libvirt confines QEMU with AppArmor or SELinux."""
        return any(model.findtext("model") in ("apparmor", "selinux") for model in self._security_models)

    @cached_property
    def qemu_user(self) -> tuple[int, int] | None:
        """(uid, gid) that libvirt gives to QEMU; None where it cannot choose (`qemu:///session`)."""
        for model in self._security_models:
            label = model.findtext("baselabel", "")
            if model.findtext("model") == "dac" and (found := re.fullmatch(r"\+(\d+):\+(\d+)", label)):
                return int(found[1]), int(found[2])
        return None

    # -- domains -------------------------------------------------------------------------------------------

    def create(self, xml: str, *, paused: bool) -> None:
        """Start a transient domain: when it ends, libvirt forgets it."""
        flags = libvirt.VIR_DOMAIN_START_PAUSED if paused else 0
        self._call("starting the guest", lambda: self._connection.createXML(xml, flags))

    def resume(self, uuid: str) -> None:
        """Let a paused domain run."""
        self._call("resuming the guest", lambda: self._lookup(uuid).resume())

    def suspend(self, uuid: str) -> None:
        """Stop a domain's processors."""
        self._call("pausing the guest", lambda: self._lookup(uuid).suspend())

    def destroy(self, uuid: str) -> bool:
        """End a domain at once. True if it was there. Its process is gone when this returns."""
        try:
            self._lookup(uuid).destroy()
        except libvirt.libvirtError as error:
            gone = (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID)
            if error.get_error_code() in gone:
                return False
            raise HostError("libvirt could not end the guest", details=str(error)) from error
        return True

    def is_active(self, uuid: str) -> bool:
        """Whether the domain runs (or is paused)."""
        try:
            return bool(self._lookup(uuid).isActive())
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return False
            raise HostError("libvirt could not be asked about the guest", details=str(error)) from error

    def is_running(self, uuid: str) -> bool:
        """Whether its processors run now."""
        state = self._call("asking for the guest's state", lambda: self._lookup(uuid).state())
        return bool(state[0] == libvirt.VIR_DOMAIN_RUNNING)

    def is_paused_by_disk(self, uuid: str) -> bool:
        """Whether QEMU has stopped it at a write to its disk that failed."""
        state = self._call("asking for the guest's state", lambda: self._lookup(uuid).state())
        return (state[0], state[1]) == (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR)

    def live_xml(self, uuid: str) -> str:
        """The XML of the domain as it runs."""
        return str(self._call("reading the guest's live XML", lambda: self._lookup(uuid).XMLDesc(0)))

    def write_rate(self, uuid: str, disk: str) -> int:
        """Bytes a second that QEMU lets a running domain write to this disk; 0: as many as it likes."""
        tuned = self._call("reading the disk's limits", lambda: self._lookup(uuid).blockIoTune(disk))
        return int(tuned["write_bytes_sec"])

    def set_memory(self, uuid: str, mib: int) -> None:
        """Let a running domain's balloon leave it this much memory."""
        flags = libvirt.VIR_DOMAIN_AFFECT_LIVE
        self._call("ballooning the guest", lambda: self._lookup(uuid).setMemoryFlags(mib * 1024, flags))

    def list_sessions(self, namespace: str) -> list[Running]:
        """The active domains whose metadata carries our namespace."""
        found = []
        for domain in self._call("listing guests", lambda: self._connection.listAllDomains(0)):
            try:
                element = domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, namespace, 0)
                session = ET.fromstring(element)  # noqa: S314 - from the trusted daemon
                id_and_home = session.get("id", ""), session.get("home", "")
                found.append(Running(domain.name(), domain.UUIDString(), *id_and_home))
            except libvirt.libvirtError:
                continue  # not one of ours, or gone meanwhile
        return found

    def attach(self, uuid: str, device_xml: str) -> None:
        """Plug a device into a running domain."""
        flags = libvirt.VIR_DOMAIN_AFFECT_LIVE
        self._call("plugging in a device", lambda: self._lookup(uuid).attachDeviceFlags(device_xml, flags))

    def detach(self, uuid: str, device_xml: str) -> None:
        """Ask a running domain to let a device go. libvirt waits some seconds for it; it may go later, or never."""
        flags = libvirt.VIR_DOMAIN_AFFECT_LIVE
        self._call("taking out a device", lambda: self._lookup(uuid).detachDeviceFlags(device_xml, flags))

    # -- networks and their filters ------------------------------------------------------------------------

    def create_network(self, xml: str) -> None:
        """Start a transient network: when it is destroyed, libvirt forgets it."""
        self._call("making the network", lambda: self._connection.networkCreateXML(xml))

    def define_filter(self, xml: str) -> None:
        """Define a network filter."""
        self._call("defining the network filter", lambda: self._connection.nwfilterDefineXML(xml))

    def network_names(self) -> set[str]:
        """The names of all networks and network filters that libvirt knows."""
        networks = self._call("listing networks", lambda: self._connection.listAllNetworks(0))
        filters = self._call("listing network filters", lambda: self._connection.listAllNWFilters(0))
        return {each.name() for each in (*networks, *filters)}

    def remove_network(self, name: str) -> bool:
        """End a transient network. True if it was there."""
        return self._unless_missing(
            "removing the network",
            lambda: self._connection.networkLookupByName(name).destroy(),
            libvirt.VIR_ERR_NO_NETWORK,
        )

    def remove_filter(self, name: str, tap: str, deadline: float = 10) -> bool:
        """Forget a network filter and its use on a tap. True if it was there.

        libvirt may still be noticing that the guest which used it is gone: `deadline` in seconds from now.
        """
        self._unless_missing(
            "taking the network filter off",
            lambda: self._connection.nwfilterBindingLookupByPortDev(tap).delete(),
            libvirt.VIR_ERR_NO_NWFILTER_BINDING,
        )
        until = time.monotonic() + deadline
        while True:
            try:
                return self._unless_missing(
                    "removing the network filter",
                    lambda: self._connection.nwfilterLookupByName(name).undefine(),
                    libvirt.VIR_ERR_NO_NWFILTER,
                )
            except HostError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)

    # -- QEMU's own monitor --------------------------------------------------------------------------------

    def qmp(self, uuid: str, command: str, arguments: dict[str, Any] | None = None, fd: int = -1) -> Any:
        """Run one QMP command and return its `return` value. `fd` >= 0 is passed along (for getfd).

        Raises:
            HostError: QEMU refused it.
        """
        text = json.dumps({"execute": command, **({"arguments": arguments} if arguments else {})})
        domain = self._call("finding the guest", lambda: self._lookup(uuid))
        if fd >= 0:
            answer = self._call(
                f"QMP {command}",
                lambda: libvirt_qemu.qemuMonitorCommandWithFiles(domain, text, [fd], 0)[0],
            )
        else:
            answer = self._call(f"QMP {command}", lambda: libvirt_qemu.qemuMonitorCommand(domain, text, 0))
        reply = json.loads(answer)
        if "error" in reply:
            raise HostError(f"QEMU refused {command}", details=json.dumps(reply["error"]))
        return reply["return"]

    def migration_finished(self, uuid: str, deadline: float) -> None:
        """Wait until QEMU says that the state transfer completed; `deadline` in seconds from now."""
        until = time.monotonic() + deadline
        pause = threading.Event()
        while True:
            status = self.qmp(uuid, "query-migrate").get("status")
            if status == "completed":
                return
            if status in ("failed", "cancelled") or time.monotonic() > until:
                raise HostError("the guest's state could not be transferred", details=f"status: {status}")
            pause.wait(0.003)

    # -- helpers -------------------------------------------------------------------------------------------

    def _lookup(self, uuid: str) -> Any:
        return self._connection.lookupByUUIDString(uuid)

    def _unless_missing(self, doing: str, call: Callable[[], object], missing: int) -> bool:
        try:
            call()
        except libvirt.libvirtError as error:
            if error.get_error_code() == missing:
                return False
            raise HostError(f"{doing} failed", details=str(error)) from error
        return True

    def _call(self, doing: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except libvirt.libvirtError as error:
            raise HostError(f"{doing} failed", details=str(error)) from error


def _open_patiently(uri: str) -> Any:
    try:
        return libvirt.open(uri)
    except libvirt.libvirtError:
        # Imported only now: a daemon that answers, the usual case, should not pay for it.
        import tenacity

        retry = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(libvirt.libvirtError),
            stop=tenacity.stop_after_delay(1),
            wait=tenacity.wait_fixed(0.25),
            reraise=True,
        )
        return retry(libvirt.open, uri)
