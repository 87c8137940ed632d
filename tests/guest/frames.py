"""Raw frames: what a hostile guest's root puts on its card, and a listener on the host that sees what gets through."""

from __future__ import annotations

import socket
import threading
import time
from types import TracebackType

_EVERYTHING = 0x0003  # ETH_P_ALL

# Runs in the guest as root. argv: interface, the guest's MAC and address, the bridge's MAC and address, marker,
# then addresses of the host or of other guests. Every frame ends in "<marker>:<what it is>;".
ATTACK = r"""
import socket, struct, sys, time
interface, mac, own, bridge_mac, broker, marker, *others = sys.argv[1:]
raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
raw.bind((interface, 0))
M = lambda text: bytes.fromhex(text.replace(":", ""))
A = socket.inet_aton
STRANGER, BROADCAST = "52:54:00:99:99:99", "ff:ff:ff:ff:ff:ff"
def total(data):
    data += b"\0" * (len(data) % 2)
    value = sum(struct.unpack("!%dH" % (len(data) // 2), data))
    while value >> 16:
        value = (value & 0xffff) + (value >> 16)
    return ~value & 0xffff
def ip(source, target, protocol, payload, fragment=0):
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 7, fragment, 64, protocol, 0) + A(source) + A(target)
    return head[:10] + struct.pack("!H", total(head)) + head[12:] + payload
def udp(port, data, source_port=4242):
    return struct.pack("!HHHH", source_port, port, 8 + len(data), 0) + data
def tcp(source, target, port, data, flags=2):
    head = struct.pack("!HHIIBBHHH", 4242, port, 1, 1, 0x50, flags, 8192, 0, 0) + data
    check = total(A(source) + A(target) + struct.pack("!BBH", 0, 6, len(head)) + head)
    return head[:16] + struct.pack("!H", check) + head[18:]
def icmp(data):
    head = struct.pack("!BBHHH", 8, 0, 0, 1, 1) + data
    return head[:2] + struct.pack("!H", total(head)) + head[4:]
def arp(sender_mac, sender, target, operation=1, target_mac="00:00:00:00:00:00"):
    return struct.pack("!HHBBH", 1, 0x800, 6, 4, operation) + M(sender_mac) + A(sender) + M(target_mac) + A(target)
def send(what, source, target, kind, payload):
    data = payload(b"%s:%s;" % (marker.encode(), what.encode())) if callable(payload) else \
        payload + b"%s:%s;" % (marker.encode(), what.encode())
    raw.send(M(target) + M(source) + struct.pack("!H", kind) + data.ljust(46, b"\0"))
    print(what)
    time.sleep(0.002)
IP, ARP, IP6 = 0x800, 0x806, 0x86dd
fine = lambda data: ip(own, broker, 17, udp(53, data))
send("other source MAC", STRANGER, bridge_mac, IP, fine)
send("broadcast to the DNS port", mac, BROADCAST, IP, fine)
send("multicast frame", mac, "01:00:5e:00:00:fb", IP, fine)
send("to another MAC", mac, STRANGER, IP, fine)
send("other source address", mac, bridge_mac, IP, lambda data: ip("192.0.2.66", broker, 17, udp(53, data)))
send("the broker's own address", mac, bridge_mac, IP, lambda data: ip(broker, broker, 17, udp(53, data)))
send("no address", mac, bridge_mac, IP, lambda data: ip("0.0.0.0", broker, 17, udp(53, data)))
send("DHCP", mac, BROADCAST, IP, lambda data: ip("0.0.0.0", "255.255.255.255", 17, udp(67, data, 68)))
send("mDNS", mac, "01:00:5e:00:00:fb", IP, lambda data: ip(own, "224.0.0.251", 17, udp(5353, data, 5353)))
send("fragment", mac, bridge_mac, IP, lambda data: ip(own, broker, 17, udp(53, data), 0x2000))
send("later fragment", mac, bridge_mac, IP, lambda data: ip(own, broker, 17, data + b"\0" * 20, 0x0005))
send("ping", mac, bridge_mac, IP, lambda data: ip(own, broker, 1, icmp(data)))
send("QUIC", mac, bridge_mac, IP, lambda data: ip(own, broker, 17, udp(443, data)))
send("SCTP", mac, bridge_mac, IP, lambda data: ip(own, broker, 132, data + b"\0" * 20))
send("GRE", mac, bridge_mac, IP, lambda data: ip(own, broker, 47, data + b"\0" * 20))
for port in (22, 111, 853, 2049, 8080, 16509, 65535):
    send("TCP port %d" % port, mac, bridge_mac, IP, lambda data: ip(own, broker, 6, tcp(own, broker, port, data)))
    send("UDP port %d" % port, mac, bridge_mac, IP, lambda data: ip(own, broker, 17, udp(port, data)))
for target in ["192.0.2.1", "198.51.100.53", "127.0.0.1", "255.255.255.255", "224.0.0.1", *others]:
    for port in (53, 80, 443):
        send("UDP %s %d" % (target, port), mac, bridge_mac, IP, lambda data: ip(own, target, 17, udp(port, data)))
        send("TCP %s %d" % (target, port), mac, bridge_mac, IP,
             lambda data: ip(own, target, 6, tcp(own, target, port, data)))
    send("ping %s" % target, mac, bridge_mac, IP, lambda data: ip(own, target, 1, icmp(data)))
send("ARP with another address", mac, BROADCAST, ARP, arp(mac, "192.0.2.66", broker))
send("ARP as the broker", mac, BROADCAST, ARP, arp(mac, broker, broker))
send("ARP reply as the broker", mac, BROADCAST, ARP, arp(mac, broker, own, 2))
send("ARP with another MAC inside", mac, BROADCAST, ARP, arp(STRANGER, own, broker))
send("ARP from another MAC", STRANGER, BROADCAST, ARP, arp(STRANGER, own, broker))
send("ARP for another address", mac, BROADCAST, ARP, arp(mac, own, "192.0.2.1"))
for target in others:
    send("ARP for %s" % target, mac, BROADCAST, ARP, arp(mac, own, target))
send("RARP", mac, BROADCAST, 0x8035, arp(mac, own, broker, 3))
six = lambda source, target, after, data: struct.pack("!IHBB", 6 << 28, len(data), after, 255) + \
    socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, target) + data
send("IPv6 UDP", mac, bridge_mac, IP6, lambda data: six("fe80::1", "2001:db8::1", 17, udp(53, data)))
send("IPv6 to all", mac, "33:33:00:00:00:01", IP6, lambda data: six("fe80::1", "ff02::1", 58, b"\x80\0\0\0" + data))
send("IPv6 router", mac, "33:33:00:00:00:01", IP6, lambda data: six("fe80::1", "ff02::1", 58, b"\x86\0\0\0" + data))
send("mapped address", mac, bridge_mac, IP6,
     lambda data: six("::ffff:" + own, "::ffff:" + broker, 17, udp(53, data)))
send("VLAN", mac, bridge_mac, 0x8100, lambda data: struct.pack("!HH", 5, IP) + fine(data))
send("VLAN 0", mac, bridge_mac, 0x8100, lambda data: struct.pack("!HH", 0, IP) + fine(data))
send("QinQ", mac, bridge_mac, 0x88a8, lambda data: struct.pack("!HHHH", 5, 0x8100, 6, IP) + fine(data))
send("spanning tree", mac, "01:80:c2:00:00:00", 39, b"\x42\x42\x03" + b"\0" * 35)
send("LLDP", mac, "01:80:c2:00:00:0e", 0x88cc, b"\x02\x07\x04" + M(mac))
send("EAPOL", mac, "01:80:c2:00:00:03", 0x888e, b"\x01\x01\0\0")
send("PPPoE", mac, BROADCAST, 0x8863, b"\x11\x09\0\0\0\0")
send("MPLS", mac, bridge_mac, 0x8847, lambda data: struct.pack("!I", 0x00010140) + fine(data))
send("no protocol of anybody's", mac, bridge_mac, 0x88b5, b"")
print("# control")
send("a DNS packet that is allowed", mac, bridge_mac, IP, fine)
send("an ARP request that is allowed", mac, BROADCAST, ARP, arp(mac, own, broker))
"""


class Listener:
    """Sees every frame that the kernel takes in on an interface, behind the filters of what lies below it."""

    def __init__(self, interface: str) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_EVERYTHING))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        self._socket.bind((interface, _EVERYTHING))
        self._socket.settimeout(0.1)
        self.frames: list[bytes] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Listener:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        time.sleep(0.3)  # what is still on its way
        self._ended.set()
        self._thread.join(5)
        self._socket.close()

    def marked(self, marker: str) -> set[str]:
        """What the marked frames say that they are."""
        found = set()
        for frame in self.frames:
            _, mark, rest = frame.partition(f"{marker}:".encode())
            if mark:
                found.add(rest.partition(b";")[0].decode())
        return found

    def _listen(self) -> None:
        while not self._ended.is_set():
            try:
                frame, (_, _, packet_type, *_) = self._socket.recvfrom(65535)
            except TimeoutError:
                continue
            if packet_type != socket.PACKET_OUTGOING:
                self.frames.append(frame)
