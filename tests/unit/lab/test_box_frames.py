"""Taking lost packets out of super-segments: what is left equals what a network card would have sent without them."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pllm_peers.lab.network import frames
from p2pllm_peers.lab.network.frames import VNET

SOURCE, TARGET = bytes([60, 0, 0, 1]), bytes([60, 0, 0, 2])
FIN, SYN, PSH, ACK, CWR = 0x01, 0x02, 0x08, 0x10, 0x80
OPTIONS = bytes.fromhex("0101080a0000000100000002")
PARTIAL = 1  # VIRTIO_NET_HDR_F_NEEDS_CSUM


def word_sum(data: bytes) -> int:
    """RFC 1071, the slow and plain way."""
    total = 0
    for index in range(0, len(data), 2):
        total += data[index] * 256 + (data[index + 1] if index + 1 < len(data) else 0)
        total = total % 65536 + total // 65536
    return total


def ip_header(length: int, identification: int, protocol: int = 6) -> bytes:
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, length, identification, 0x4000, 64, protocol, 0, SOURCE, TARGET)
    return head[:10] + struct.pack("!H", 65535 - word_sum(head)) + head[12:]


def tcp_header(sequence: int, flags: int, checksum: int) -> bytes:
    return struct.pack("!HHIIBBHHH", 4001, 5001, sequence, 77, 8 << 4, flags, 512, checksum, 0) + OPTIONS


def pseudo(length: int) -> int:
    return word_sum(SOURCE + TARGET + struct.pack("!HH", 6, length))


def super_segment(payload: bytes, size: int, sequence: int = 1000, flags: int = ACK | PSH | FIN | CWR) -> bytes:
    """As a tun device gives it: one header, checksum field with the sum of the pseudo-header alone."""
    tcp = tcp_header(sequence, flags, pseudo(32 + len(payload)))
    vnet = VNET.pack(PARTIAL, 1 if len(payload) > size else 0, 52, size if len(payload) > size else 0, 20, 16)
    return vnet + ip_header(52 + len(payload), 65534) + tcp + payload


def on_the_wire(payload: bytes, size: int, sequence: int, flags: int) -> list[bytes]:
    """The packets that a network card makes of it, each with its whole checksum, written without `frames`."""
    packets = []
    pieces = [payload[at : at + size] for at in range(0, len(payload), size)]
    for index, piece in enumerate(pieces):
        kept = flags
        if index < len(pieces) - 1:
            kept &= ~(FIN | PSH)
        if index:
            kept &= ~CWR
        tcp = tcp_header((sequence + index * size) % 2**32, kept, 0) + piece
        checksum = 65535 - word_sum(struct.pack("!H", pseudo(len(tcp))) + tcp)
        tcp = tcp[:16] + struct.pack("!H", checksum) + tcp[18:]
        packets.append(ip_header(20 + len(tcp), (65534 + index) % 65536) + tcp)
    return packets


def sent(frame: bytes) -> list[bytes]:
    """What the receiving kernel takes a frame for: its packets, checksums completed as its header asks."""
    flags, kind, header, size, start, offset = VNET.unpack_from(frame)
    packet = frame[VNET.size :]
    assert (flags, start, offset) == (PARTIAL, 20, 16)
    assert packet[2:4] == struct.pack("!H", len(packet)) and word_sum(packet[:20]) == 65535
    assert packet[36:38] == struct.pack("!H", pseudo(len(packet) - 20))
    if not kind:
        assert size == 0
        return [packet[:36] + struct.pack("!H", 65535 - word_sum(packet[20:])) + packet[38:]]
    assert header == 52 and len(packet) > 52 + size
    sequence, tcp_flags = struct.unpack_from("!I", packet, 24)[0], packet[33]
    packets = on_the_wire(packet[52:], size, sequence, tcp_flags)
    first = int.from_bytes(packet[4:6], "big")
    return [ip_header(len(one), (first + index) % 65536) + one[20:] for index, one in enumerate(packets)]


@given(
    st.binary(min_size=1, max_size=200),
    st.integers(1, 40),
    st.integers(0, 2**32 - 1),
    st.sets(st.integers(0, 199)),
    st.sampled_from([ACK, ACK | PSH, ACK | PSH | FIN, ACK | PSH | CWR]),
)
def test_the_survivors_are_the_packets_that_were_not_lost(payload, size, sequence, lost, flags):
    frame = super_segment(payload, size, sequence, flags)
    whole = on_the_wire(payload, size, sequence, flags)
    lost = {index for index in lost if index < len(whole)}
    survivors = [packet for piece in frames.without(frame, lost) for packet in sent(piece)]
    assert survivors == [packet for index, packet in enumerate(whole) if index not in lost]


def test_neighbours_stay_together():
    frame = super_segment(bytes(range(250)), 10)
    assert len(frames.without(frame, {3, 4, 20})) == 3
    assert frames.without(frame, set(range(25))) == []


@given(st.binary(min_size=1, max_size=400), st.integers(1, 100))
def test_a_frame_counts_as_its_packets_with_their_headers(payload, size):
    packets = on_the_wire(payload, size, 1, ACK)
    assert frames.packets(super_segment(payload, size)) == (len(packets), sum(14 + len(one) for one in packets))


@given(st.binary(max_size=1500), st.integers(0, 65535))
def test_the_checksum_is_that_of_rfc_1071(data, start):
    assert frames.checksum(data, start) == word_sum(struct.pack("!H", start) + data)


def test_an_answer_is_of_the_flow_that_it_answers():
    question = super_segment(b"x", 100)
    ports = 4001, 5001
    answer = bytearray(question)
    answer[22:30] = TARGET + SOURCE
    answer[30:34] = struct.pack("!HH", *reversed(ports))
    assert frames.outgoing(question) == frames.incoming(bytes(answer)) == (6, TARGET, struct.pack("!HH", *ports))
    other_port = answer[:30] + struct.pack("!HH", 5002, 4001) + answer[34:]
    assert frames.incoming(bytes(other_port)) != frames.outgoing(question)


@pytest.mark.parametrize("change", [(9, 1), (7, 1)], ids=["icmp", "later fragment"])
def test_what_has_no_ports_is_of_no_flow(change):
    frame = bytearray(super_segment(b"x", 100))
    frame[VNET.size + change[0]] = change[1]
    assert frames.outgoing(bytes(frame)) is None
