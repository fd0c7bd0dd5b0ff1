"""The star of namespaces: what its lines really do, and what befalls them."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from p2pllm.errors import RunError
from p2pllm_peers.lab.cleanup.claims import Claims
from p2pllm_peers.lab.evidence import LinkCheck
from p2pllm_peers.lab.network import links as links_module
from p2pllm_peers.lab.network.checking import answer, phase, plan, program
from p2pllm_peers.lab.network.links import Links, why_not
from p2pllm_peers.lab.network.netem import device_counters, hub_commands, mac, qdisc_commands
from p2pllm_peers.lab.network.probe import Plan
from p2pllm_peers.lab.reporting.lines import link_is_right
from p2pllm_peers.lab.scenario import Link

real = pytest.mark.skipif(why_not() != "", reason=why_not())
PROBE = [sys.executable, "-m", "p2pllm_peers.lab.network.probe"]
HOME = Link(up_mbit=20, down_mbit=100, delay_ms=20.0)


@contextlib.contextmanager
def star(tmp_path: Path, links: dict[str, Link], **how: object) -> Iterator[Links]:
    with Claims.open(tmp_path / "ledgers") as claims:
        made = Links(claims, links, **how)
        made.start()
        try:
            yield made
        finally:
            made.stop()
    assert claims.left_over() == []


class Callers:
    """A server at every peer, and programs that ask them. Ends with the test."""

    def __init__(self, links: Links, peers: str, stack: contextlib.ExitStack) -> None:
        self._links = links
        self._stack = stack
        for peer in peers:
            answer(stack.enter_context(program([*links.prefix(peer), *PROBE, "serve"])), peer)

    def reach(self, peer: str, other: str) -> float:
        """Share of 10 datagrams from `peer` to `other` that are answered."""
        how = json.dumps(asdict(Plan(pings=10, ping_every_s=0.005, wait_s=0.4, warm_s=0, count_s=0, streams=1)))
        words = [*self._links.prefix(peer), *PROBE, "measure", self._links.address(other), how]
        with program(words) as caller:
            return 1 - phase({peer: caller}, "ping")[peer]["lost"]

    def connect(self, peer: str, other: str) -> str:
        """What becomes of a TCP connection that `peer` opens to `other`."""
        code = f"import socket; socket.create_connection(('{self._links.address(other)}', 7), timeout=0.5)"
        result = subprocess.run(
            [*self._links.prefix(peer), sys.executable, "-c", code], capture_output=True, text=True, timeout=10
        )
        return result.stderr.strip().splitlines()[-1] if result.returncode else "open"


# -- pure -----------------------------------------------------------------------------------------------------------


def test_a_line_with_only_rates_needs_no_netem():
    link = Link(up_mbit=20, down_mbit=100)
    assert qdisc_commands("eth0", 20, link) == [
        "qdisc add dev eth0 root handle 1: tbf rate 20000000bit burst 12112 latency 0.2s"
    ]


def test_netem_delays_and_loses_before_tbf_limits():
    link = Link(up_mbit=20, down_mbit=800, delay_ms=25.0, loss=0.015)
    first, second = qdisc_commands("v3", 800, link)
    assert first == "qdisc add dev v3 root handle 1: netem delay 25.000ms 0.000ms loss 1.5000% limit 40062"
    assert second == "qdisc add dev v3 parent 1:1 handle 2: tbf rate 800000000bit burst 400000 latency 0.2s"


def test_jitter_only_adds_and_never_reorders():
    link = Link(up_mbit=20, down_mbit=100, delay_ms=10.0, jitter_ms=4)
    assert "netem delay 12.000ms 2.000ms rate 100gbit" in qdisc_commands("eth0", 20, link)[0]


def test_the_kernels_star_keeps_packets_as_they_are_on_a_wire():
    commands = hub_commands(["a", "b"])
    assert "link add v1 type veth peer name eth0 netns b" in commands
    assert all(any(f"v{peer}" in line and "gso_max_segs 1" in line for line in commands) for peer in range(2))
    assert mac(0) == "02:00:00:00:00:01" and mac(255) == "02:00:00:00:01:00"


def test_counters_are_read_from_the_hub():
    rows = [("lo", 0, 0, 0, 0), ("v1", 5, 6, 7, 8), ("v0", 1, 2, 3, 4)]
    lines = [f"{name:>6}: {i} {pi} 0 0 0 0 0 0 {o} {po} 0 0 0 0 0 0" for name, i, pi, o, po in rows]
    text = "\n".join(["Inter-|   Receive  |  Transmit", " face |bytes    packets errs |bytes", *lines])
    assert device_counters(text, 2) == [(1, 2, 3, 4), (5, 6, 7, 8)]


def test_a_slow_long_or_lossy_line_is_measured_longer():
    plain = plan(Link(up_mbit=100, down_mbit=100, delay_ms=5.0), 4)
    slow = plan(Link(up_mbit=1, down_mbit=100, delay_ms=5.0), 4)
    long = plan(Link(up_mbit=100, down_mbit=100, delay_ms=150.0), 4)
    lossy = plan(Link(up_mbit=100, down_mbit=100, delay_ms=5.0, loss=0.01), 4)
    assert slow.count_s > plain.count_s and slow.ping_every_s > plain.ping_every_s
    assert long.warm_s > plain.warm_s and long.wait_s > plain.wait_s
    assert lossy.pings > plain.pings
    crowd = plan(Link(up_mbit=100, down_mbit=100, delay_ms=5.0, loss=0.01), 64)
    assert crowd.pings * crowd.ping_every_s < 3


def test_what_is_missing_is_said_in_one_clause(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    reason = why_not()
    assert "root" in reason and not reason.endswith(".")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(links_module.shutil, "which", lambda program: None)
    if Path("/proc/self/ns/net").exists():
        assert "iproute2" in why_not()


# -- real namespaces ------------------------------------------------------------------------------------------------


def checked(links: Links) -> list[LinkCheck]:
    """Each line as measured; again, at most five times, where a busy machine may have disturbed it."""
    found: dict[str, LinkCheck] = {}
    for _ in range(6):
        found |= {row.peer: row for row in links.check() if row.peer not in found or not link_is_right(found[row.peer])}
        if all(map(link_is_right, found.values())):
            return list(found.values())
    if links.emulator().late_p99_ms > 2:
        pytest.skip("this machine does not let the box run when it is due")
    return list(found.values())


@pytest.mark.swarm
@pytest.mark.alone
@real
def test_a_peer_sees_what_its_cgroup_allows(tmp_path: Path) -> None:
    code = "import os; print(sorted(os.listdir('/sys/fs/cgroup')))"
    with star(tmp_path, {"a": HOME, "b": HOME}) as links:
        seen = [
            subprocess.run([*prefix, sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
            for prefix in ([], links.prefix("a"))
        ]
    assert seen[0] == seen[1]


@real
def test_lines_do_what_was_asked(tmp_path):
    office = Link(up_mbit=50, down_mbit=50, delay_ms=5.0, jitter_ms=1, loss=0.01)
    with star(tmp_path, {"a": HOME, "b": office}, kind="box") as links:
        for row in checked(links):
            assert row.measured_up_mbit == pytest.approx(row.asked_up_mbit, rel=0.05), row
            assert row.measured_down_mbit == pytest.approx(row.asked_down_mbit, rel=0.05), row
            assert row.measured_delay_ms == pytest.approx(row.asked_delay_ms, abs=2), row
            assert row.measured_loss == pytest.approx(row.asked_loss, abs=0.015), row
        emulator = links.emulator()
        up, down = links.counters()["a"]
    assert emulator.kind == "tun box"
    assert emulator.cpu_s > 0 and emulator.frames > 1000 and emulator.late_max_ms >= emulator.late_p99_ms > 0
    assert up > 20e6 / 8 * 1.5 and down > 100e6 / 8 * 1.5


@pytest.mark.swarm
@real
def test_cuts_and_partitions_are_silent_and_can_be_undone(tmp_path):
    line = Link(up_mbit=100, down_mbit=100, delay_ms=1.0)
    with star(tmp_path, dict.fromkeys("abcd", line)) as links, contextlib.ExitStack() as stack:
        callers = Callers(links, "abc", stack)
        assert callers.reach("a", "b") == 1
        links.cut("b")
        assert callers.reach("a", "b") == callers.reach("b", "c") == 0
        assert "timed out" in callers.connect("a", "b")
        assert callers.reach("a", "c") == 1
        links.mend("b")
        links.cut("a", "b")
        assert callers.reach("a", "b") == callers.reach("b", "a") == 0
        assert callers.reach("b", "c") == 1
        links.partition([["a", "b"], ["c"]])
        links.mend("a", "b")
        assert callers.reach("a", "b") == 1
        assert callers.reach("a", "c") == callers.reach("d", "c") == callers.reach("d", "a") == 0
        links.heal()
        assert callers.reach("a", "c") == callers.reach("d", "c") == 1


@pytest.mark.swarm
@real
def test_nobody_connects_to_a_peer_behind_nat_and_a_line_can_change(tmp_path):
    line = Link(up_mbit=100, down_mbit=100, delay_ms=1.0)
    lines = {"a": line, "b": line.model_copy(update={"nat": True})}
    with star(tmp_path, lines) as links, contextlib.ExitStack() as stack:
        callers = Callers(links, "ab", stack)
        assert "timed out" in callers.connect("a", "b")
        assert callers.connect("b", "a") == "open"
        assert callers.reach("b", "a") == 1
        assert callers.reach("a", "b") == 0
        links.change("b", line)
        assert callers.connect("a", "b") == "open"


@pytest.mark.swarm
@pytest.mark.alone
@real
def test_the_kernels_lines_have_the_rates_that_were_asked(tmp_path):
    """Without delays its star needs no netem, so it runs on every kernel with tbf."""
    line = Link(up_mbit=20, down_mbit=50)
    with star(tmp_path, dict.fromkeys("abc", line), kind="kernel") as links, contextlib.ExitStack() as stack:
        for row in checked(links):
            assert row.measured_up_mbit == pytest.approx(20, rel=0.05), row
            assert row.measured_down_mbit == pytest.approx(50, rel=0.05), row
            assert row.measured_delay_ms < 2
        assert links.emulator().bytes > 3 * (20 + 50) * 1e6 / 8
        callers = Callers(links, "abc", stack)
        links.cut("a", "b")
        assert callers.reach("a", "b") == 0 and callers.reach("a", "c") == 1
        links.mend("a", "b")
        assert callers.reach("a", "b") == 1
        with pytest.raises(RunError, match="NAT"):
            links.change("a", line.model_copy(update={"nat": True}))


@pytest.mark.swarm
@real
def test_a_box_that_was_killed_is_named(tmp_path):
    with star(tmp_path, {"a": HOME}, kind="box") as links:
        before = links.emulator()
        links._wires._process.kill()
        with pytest.raises(RunError, match="network box has failed"):
            links.cut("a")
        assert links.emulator() == before  # its last words


@pytest.mark.swarm
@real
def test_addresses_are_public_and_programs_keep_their_process(tmp_path):
    with star(tmp_path, {"a": HOME, "b": HOME}) as links:
        code = "import os; print(os.getpid())"
        child = subprocess.Popen(
            [*links.prefix("a"), sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert int(child.communicate(timeout=10)[0]) == child.pid
        assert links.address("a") != links.address("b")
        shown = subprocess.run([*links.prefix("a"), "ip", "-6", "address", "show", "eth0"], capture_output=True)
        assert shown.stdout == b""


@pytest.mark.swarm
@pytest.mark.parametrize("kind", ["box", "kernel"])
@real
def test_nothing_that_runs_on_keeps_the_guard_waiting(tmp_path, kind):
    """Nobody but the lab holds the pipe to its guard: not the box or its kin, and not what measures."""
    line = Link(up_mbit=50, down_mbit=50)
    with star(tmp_path, {"a": line}, kind=kind) as links, contextlib.ExitStack() as stack:
        Callers(links, "a", stack)
        guard = links._claims._guard.pid
        assert holders(Path(f"/proc/{guard}/fd/0").stat()) == {os.getpid(), guard}


def holders(pipe: os.stat_result) -> set[int]:
    """Processes that have an end of it open."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # it has ended, or has closed it
            status = entry.stat()
            if (status.st_dev, status.st_ino) == (pipe.st_dev, pipe.st_ino):
                found.add(int(entry.parts[2]))
    return found
