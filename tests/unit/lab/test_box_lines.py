"""Rates, delays, jitter, losses, cuts and NAT of the box, on a clock that the test moves."""

import itertools
import struct

import pytest

from p2pllm_peers.lab.network.frames import VNET
from p2pllm_peers.lab.network.lines import EARLY_S, QUEUE_S, Lines

ADDRESSES = [bytes([60, 0, 0, number]) for number in (1, 2, 3)]
BYTES = 1250  # 1 ms at 10 Mbit/s, with Ethernet header


def datagram(source: int, target: int, size: int = BYTES, ports: tuple[int, int] = (4001, 5001), tag: int = 0) -> bytes:
    """A UDP packet that is `size` bytes on the wire."""
    length = size - 14
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, length, 0, 0, 64, 17, 0, ADDRESSES[source], ADDRESSES[target])
    body = struct.pack("!HHHH", *ports, length - 20, 0) + struct.pack("!I", tag)
    return bytes(VNET.size) + head + body.ljust(length - 20, b"\0")


def segment(source: int, target: int, packets: int) -> bytes:
    """A TCP super-segment of so many full packets."""
    size = 1448
    length = 52 + packets * size
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, length, 0, 0, 64, 6, 0, ADDRESSES[source], ADDRESSES[target])
    tcp = struct.pack("!HHIIBBHHH", 4001, 5001, 1, 1, 8 << 4, 0x10, 512, 0, 0) + bytes(12)
    return (
        VNET.pack(1, 1 if packets > 1 else 0, 52, size if packets > 1 else 0, 20, 16)
        + head
        + tcp
        + bytes(packets * size)
    )


def tag_of(frame: bytes) -> int:
    return struct.unpack_from("!I", frame, VNET.size + 28)[0]


class Bench:
    """Lines, their clock, and what was handed over when."""

    def __init__(self, seed: int = 0, **line: object) -> None:
        self.now = 100.0
        self.arrived: list[tuple[float, int, bytes]] = []
        self.lines = Lines(ADDRESSES, self._got, seed, lambda: self.now)
        for index in range(len(ADDRESSES)):
            self.set(index, **line)

    def set(self, peer: int, **changes: object) -> None:
        plain = {"up_mbit": 0, "down_mbit": 0, "delay_ms": 0, "jitter_ms": 0, "loss": 0, "nat": False}
        self.lines.change(peer, **(plain | changes))

    def send(self, source: int, target: int, frame: bytes | None = None, **how: object) -> None:
        self.lines.take(source, frame or datagram(source, target, **how))

    def run(self, seconds: float = 10.0) -> list[float]:
        """Go on for so long; returns the times of all arrivals in ms from the start."""
        self.pause(seconds)
        return [round((at - 100.0) * 1e3, 1) for at, _, _ in self.arrived]

    def pause(self, seconds: float) -> None:
        """Deliver what is due meanwhile."""
        end = self.now + seconds
        while (wait := self.lines.deliver()) is not None and self.now + wait < end:
            self.now += max(wait, EARLY_S)
        self.now = end

    def _got(self, target: int, frame: bytes) -> None:
        self.arrived.append((self.now, target, frame))


def test_delays_of_both_lines_add_up():
    bench = Bench(delay_ms=10)
    bench.set(1, delay_ms=25)
    bench.send(0, 1)
    assert bench.run() == pytest.approx([35], abs=0.15)


def test_each_line_has_its_rate_and_frames_queue():
    bench = Bench()
    bench.set(0, up_mbit=10)
    for _ in range(5):
        bench.send(0, 1)
    assert bench.run() == pytest.approx([1, 2, 3, 4, 5], abs=0.15)


def test_senders_share_the_line_of_the_receiver_in_the_order_in_which_they_reach_it():
    bench = Bench()
    bench.set(0, delay_ms=50)
    bench.set(1, down_mbit=10)
    bench.send(0, 1, tag=1)  # sent first, there last
    bench.send(2, 1, tag=2)
    bench.send(2, 1, tag=3)
    assert bench.run() == pytest.approx([1, 2, 51], abs=0.15)
    assert [tag_of(frame) for _, _, frame in bench.arrived] == [2, 3, 1]


def test_packets_of_a_super_segment_follow_each_other_through_both_lines():
    bench = Bench()
    bench.set(0, up_mbit=12.112)  # a full packet takes 1 ms
    bench.set(1, down_mbit=12.112)
    bench.send(0, 1, segment(0, 1, 8))
    assert bench.run() == pytest.approx([9], abs=0.15)  # as eight packets would, and not 16


def test_a_fast_line_after_a_slow_one_adds_one_packet():
    bench = Bench()
    bench.set(0, up_mbit=12.112)
    bench.set(1, down_mbit=121.12)
    bench.send(0, 1, segment(0, 1, 8))
    assert bench.run() == pytest.approx([8.1], abs=0.15)


def test_jitter_delays_within_its_bounds_and_nothing_overtakes_within_a_pair():
    bench = Bench(delay_ms=10, jitter_ms=4)
    sent = {}
    for tag in range(500):
        sent[tag] = bench.now
        bench.send(0, 1, tag=tag)
        bench.pause(0.01 if tag % 3 else 0.0001)  # two close together, then longer than all jitter
    bench.pause(1)
    assert [tag_of(frame) for _, _, frame in bench.arrived] == list(range(500))
    delays = [(at - sent[tag_of(frame)]) * 1e3 for at, _, frame in bench.arrived]
    assert 19.9 <= min(delays) < 21.5
    assert 26.5 < max(delays) <= 28.1


def test_a_queue_drops_what_comes_on_top():
    bench = Bench()
    bench.set(0, up_mbit=10)
    for _ in range(1000):
        bench.send(0, 1)
    assert len(bench.run()) == bench.lines.lines[0].sent // BYTES == pytest.approx(QUEUE_S * 1000, abs=2)
    assert bench.lines.dropped == 1000 - len(bench.arrived)


def test_the_receivers_queue_drops_too():
    bench = Bench()
    bench.set(1, down_mbit=10)
    for _ in range(1000):
        bench.send(0, 1)
    assert len(bench.run()) == pytest.approx(QUEUE_S * 1000, abs=2)
    assert bench.lines.lines[0].sent == 1000 * BYTES
    assert bench.lines.lines[1].received == len(bench.arrived) * BYTES


def test_losses_are_of_packets_of_both_lines_and_follow_from_the_seed():
    def received(seed: int) -> list[int]:
        bench = Bench(seed, loss=0.1)
        for _ in range(500):
            bench.send(0, 1, segment(0, 1, 10))
        bench.run()
        return [len(frame) for _, _, frame in bench.arrived]

    one = received(1)
    packets = sum((length - VNET.size - 52) / 1448 for length in one)
    assert packets / 5000 == pytest.approx(0.9 * 0.9, abs=0.02)
    assert len(one) > 500  # what is left of a super-segment is not lost with it
    assert one == received(1) != received(2)


def test_a_packet_is_lost_whatever_became_of_the_one_before():
    bench = Bench()
    bench.send(0, 1)
    bench.set(1, loss=0.2)  # from now on
    for tag in range(1, 20001):
        bench.send(0, 1, tag=tag)
        bench.pause(1e-4)
    arrived = {tag_of(frame) for _, _, frame in bench.arrived}
    lost = [tag not in arrived for tag in range(1, 20001)]
    after_a_loss = [is_lost for before, is_lost in itertools.pairwise(lost) if before]
    assert sum(lost) / len(lost) == pytest.approx(0.2, abs=0.015)
    assert sum(after_a_loss) / len(after_a_loss) == pytest.approx(0.2, abs=0.03)
    assert bench.lines.dropped == sum(lost)


def test_blocked_pairs_are_dead_one_way():
    bench = Bench()
    bench.lines.block({(0, 1)})
    bench.send(0, 1)
    bench.send(1, 0)
    bench.send(0, 2)
    bench.run()
    assert [target for _, target, _ in bench.arrived] == [0, 2]
    assert bench.lines.lines[0].sent == 2 * BYTES  # the peer did send it


def test_nobody_opens_a_flow_to_a_peer_behind_nat():
    bench = Bench(delay_ms=10)
    bench.set(1, nat=True)
    bench.send(0, 1, ports=(4001, 5001))
    assert bench.run() == []
    bench.send(1, 0, ports=(5001, 4001))
    bench.send(0, 1, ports=(4001, 5001))
    bench.send(0, 1, ports=(4002, 5001))
    bench.send(2, 1, ports=(4001, 5001))
    bench.run()
    assert [target for _, target, _ in bench.arrived] == [0, 1]


def test_a_nat_forgets_a_silent_flow():
    bench = Bench()
    bench.set(1, nat=True)
    bench.send(1, 0, ports=(5001, 4001))
    bench.now += 200
    bench.send(0, 1, ports=(4001, 5001))
    bench.now += 200
    bench.send(0, 1, ports=(4001, 5001))
    bench.now += 301
    bench.send(0, 1, ports=(4001, 5001))
    while bench.lines.deliver() is not None:
        pass
    assert [target for _, target, _ in bench.arrived] == [0, 1, 1]


def test_lateness_is_counted_when_the_box_is_not_in_time():
    bench = Bench()
    bench.set(0, up_mbit=10)
    for _ in range(199):
        bench.send(0, 1)
        bench.now += 0.0011
        bench.lines.deliver()
    assert bench.lines.late_max_ms < 1
    bench.send(0, 1)
    bench.now += 0.501
    bench.lines.deliver()
    assert bench.lines.late_max_ms == pytest.approx(500, abs=1)
    assert bench.lines.late_p99_ms() < 1  # one of 200


def test_what_nobody_has_the_address_of_vanishes():
    bench = Bench()
    frame = bytearray(datagram(0, 1))
    frame[26:30] = bytes([8, 8, 8, 8])
    bench.send(0, 1, bytes(frame))
    assert bench.run() == []
