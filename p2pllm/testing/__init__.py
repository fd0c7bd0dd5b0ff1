"""The public test kit: swarms in memory and virtual time, for tests that never wait and never flake.

    from p2pllm.testing import MemorySwarm, virtual


    @virtual
    async def test_survivors_go_on_when_a_peer_dies_in_the_exchange():
        swarm = MemorySwarm(rounds=5, samples=12)  # fields of the run file's [round]
        first, second, third = swarm.add(3)
        swarm.fail_at(peer=2, round=2, phase="exchange", how="kill")
        swarm.network.set_latency(first.id, second.id, 0.02)  # seconds one way

        await swarm.start()
        await swarm.finish()  # all that live are at the run's end, with the same bits

        swarm.check_rounds()  # no round was committed with two outcomes
        assert third.host.dead
        assert [record.round for record in first.records] == [1, 2, 3, 4, 5]
        assert len(second.records[-1].members) == 2
        assert second.host.sent["vote"].messages >= 5

That is a whole test file. Where to look for more:

- `clock`: `virtual` and `run`. Time jumps to the next timer; when everything waits for nothing, DeadlockError.
- `network`: `MemoryNetwork` and its hosts, each a Transport and a Dialer: latency, jitter, kill, freeze, cut,
  partition, and counters of messages and bytes by method. Test a protocol of your own on bare hosts.
- `swarm`: `MemorySwarm` of `MemoryPeer`s, the real protocol; `Parts` to replace the all-reduce or the compute.
- `faults`: `fail_at`, faults that strike in a phase of a round.
- `fakes`: `FakeCompute` and small states, runs and messages.
- `plugin`: for pytest, `pytest_plugins = ["p2pllm.testing.plugin"]`: the fixture `lab` runs a scenario with real
  processes and returns its report. Nothing else here needs pytest.
"""

from p2pllm.testing.clock import DeadlockError, VirtualLoop, run, virtual
from p2pllm.testing.fakes import LAYOUT, FakeCompute, branch, head, make_manifest, make_state, status
from p2pllm.testing.faults import SLOW_S, fail_at
from p2pllm.testing.host import Count, MemoryHost
from p2pllm.testing.network import MemoryNetwork, identity_number, peer_number
from p2pllm.testing.swarm import MemoryPeer, MemorySwarm, Parts

__all__ = [
    "LAYOUT",
    "SLOW_S",
    "Count",
    "DeadlockError",
    "FakeCompute",
    "MemoryHost",
    "MemoryNetwork",
    "MemoryPeer",
    "MemorySwarm",
    "Parts",
    "VirtualLoop",
    "branch",
    "fail_at",
    "head",
    "identity_number",
    "make_manifest",
    "make_state",
    "peer_number",
    "run",
    "status",
    "virtual",
]
