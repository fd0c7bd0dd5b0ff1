"""The frames of a tun device with virtio-net headers: what is in them, and how to take lost packets out of one.

A frame is a header of 10 bytes that the kernel put before the packet, then an IPv4 packet. TCP packets come as
super-segments: one header and up to 64 KB of payload, to be cut into packets of at most `gso_size` bytes of payload
by whoever sends them on a wire. We pass them on whole, which is what makes a box in Python fast enough, and count
and lose them packet by packet. Pure; what does not live here: when a frame passes (`lines`), and devices (`box`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

VNET = struct.Struct("=BBHHHH")
"""struct virtio_net_hdr: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset."""

IP_AT = VNET.size
SOURCE, DESTINATION = slice(IP_AT + 12, IP_AT + 16), slice(IP_AT + 16, IP_AT + 20)

ETHERNET_BYTES = 14
"""Each packet is counted with an Ethernet header, as the kernel's own counters and shapers count it."""

PLAIN = ETHERNET_BYTES - IP_AT
"""What a frame of one packet is longer on the wire than here."""

LARGEST_FRAME = IP_AT + 0xFFFF

TCP, UDP = 6, 17
_FIN_PSH, _CWR = 0x09, 0x80
_FRAGMENT = 0x1FFF

Flow = tuple[int, bytes, bytes]
"""Protocol, the other side's address, and the two ports, our own first."""


def packets(frame: bytes) -> tuple[int, int]:
    """(packets, bytes) that a frame is on the wire, with Ethernet, IP and TCP headers of each packet."""
    if not frame[1]:
        return 1, len(frame) + PLAIN
    size = frame[4] | frame[5] << 8
    header = _header_bytes(frame)
    count = -(-(len(frame) - IP_AT - header) // size) or 1
    return count, len(frame) - IP_AT + (count - 1) * header + count * ETHERNET_BYTES


def without(frame: bytes, lost: set[int]) -> list[bytes]:
    """What is left of a frame when the packets with the given indexes are lost: one frame a run of survivors.

    Checksums and headers are those that the kernel would have given to the packets between the losses.
    """
    count, _ = packets(frame)
    if count == 1:
        return [] if lost else [frame]
    return [_run(frame, first, last, count) for first, last in _runs(count, lost)]


def outgoing(frame: bytes) -> Flow | None:
    """The flow that a frame belongs to, seen from its sender; None for what is neither TCP nor UDP."""
    return _flow(frame, frame[DESTINATION], own_first=True)


def incoming(frame: bytes) -> Flow | None:
    """The same, seen from its receiver: equal to `outgoing` of the receiver's own packets in that flow."""
    return _flow(frame, frame[SOURCE], own_first=False)


def checksum(data: bytes, start: int = 0) -> int:
    """The sum of 16-bit words of RFC 1071, folded, before the final complement."""
    if len(data) % 2:
        data += b"\0"
    total: int = start + sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def _runs(count: int, lost: set[int]) -> Iterator[tuple[int, int]]:
    """[first, last) of each row of neighbours that are not lost."""
    first = 0
    for index in [*sorted(lost), count]:
        if first < index:
            yield first, index
        first = index + 1


def _run(frame: bytes, first: int, last: int, count: int) -> bytes:
    """The packets [first, last) of a TCP super-segment as a frame of their own."""
    flags, kind, _, size, start, offset = VNET.unpack_from(frame)
    header = _header_bytes(frame)
    ip_bytes = (frame[IP_AT] & 15) * 4
    head = bytearray(frame[IP_AT : IP_AT + header])
    payload = frame[IP_AT + header :][first * size : last * size]
    length = header + len(payload)
    identification = (int.from_bytes(head[4:6], "big") + first) & 0xFFFF
    struct.pack_into("!HH", head, 2, length, identification)
    struct.pack_into("!H", head, 10, 0)
    struct.pack_into("!H", head, 10, 0xFFFF ^ checksum(bytes(head[:ip_bytes])))
    sequence = (int.from_bytes(head[ip_bytes + 4 : ip_bytes + 8], "big") + first * size) & 0xFFFFFFFF
    struct.pack_into("!I", head, ip_bytes + 4, sequence)
    if last < count:
        head[ip_bytes + 13] &= ~_FIN_PSH
    if first:
        head[ip_bytes + 13] &= ~_CWR
    # "needs checksum" means that the field holds the sum of the pseudo-header alone, and that is all that changed
    pseudo = bytes(head[12:20]) + struct.pack("!HH", TCP, length - ip_bytes)
    struct.pack_into("!H", head, ip_bytes + 16, checksum(pseudo))
    if last - first == 1:
        kind = size = 0
    return VNET.pack(flags, kind, header, size, start, offset) + head + payload


def _header_bytes(frame: bytes) -> int:
    """Length of the IP and TCP headers; the hdr_len of the virtio-net header is only a hint."""
    ip_bytes = (frame[IP_AT] & 15) * 4
    return ip_bytes + (frame[IP_AT + ip_bytes + 12] >> 4) * 4


def _flow(frame: bytes, other: bytes, *, own_first: bool) -> Flow | None:
    protocol = frame[IP_AT + 9]
    if protocol not in (TCP, UDP) or int.from_bytes(frame[IP_AT + 6 : IP_AT + 8], "big") & _FRAGMENT:
        return None
    ports = IP_AT + (frame[IP_AT] & 15) * 4
    source, destination = frame[ports : ports + 2], frame[ports + 2 : ports + 4]
    return protocol, other, source + destination if own_first else destination + source
