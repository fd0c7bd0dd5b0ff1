"""torch's DistributedDataParallel over gloo, one rank a machine: the classic of a data centre, where nobody leaves.

    python -m baselines.ddp        started by `fleet`

Set up as PyTorch documents it:

- "with ddp.no_sync(): for input in inputs: ddp(input).backward()  # no synchronization, accumulate grads", then
  "ddp(another_input).backward()  # synchronize grads" (docs of DistributedDataParallel.no_sync): one synchronisation
  for each global batch.
- GLOO_SOCKET_IFNAME names the interface (docs of torch.distributed, "Common environment variables").
- Where the run sends fp16, so does DDP, with `fp16_compress_hook` (docs of DDP Communication Hooks).

Each rank takes an equal share of the global batch, rounded up. DDP averages the ranks' gradients with equal weights, so
anything else would change what is computed.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import os
import socket
from typing import Any

import psutil
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from baselines.peer import ClippedAdamW, Peer, groups, schedule


def main() -> None:
    """Train with an equal share of the global batch until ended."""
    peer = Peer()
    order = peer.order
    os.environ["GLOO_SOCKET_IFNAME"] = interface_of(order.host)
    contact = peer.meet(lambda: f"tcp://{order.host}:{free_port(order.host)}")
    dist.init_process_group("gloo", init_method=contact, rank=order.rank, world_size=order.peers)
    model = wrap(peer)
    optimizer = ClippedAdamW(groups(peer.model), peer.draft.optimizer)
    scheduler = schedule(optimizer, peer.draft)
    share = -(-peer.draft.round.samples // order.peers)
    peer.wait_go()
    for number in itertools.count(1):
        optimizer.zero_grad()
        *first, last = peer.micro_batches(share)
        with model.no_sync():
            loss = sum(peer.backward(model, windows, share) for windows in first)
        loss += peer.backward(model, last, share)
        optimizer.step()
        scheduler.step()
        peer.commit(number, share, loss)


def wrap(peer: Peer) -> DistributedDataParallel:
    """The model under DDP. Its buffers never change, so they need not travel with each batch."""
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # torch 2.13 renamed it
    keywords: dict[str, Any] = {name: False}
    model = DistributedDataParallel(peer.model, **keywords)
    if peer.draft.round.codec == "fp16":
        model.register_comm_hook(None, fp16_compress_hook)
    return model


def interface_of(host: str) -> str:
    """Name of the interface that has this address."""
    found = psutil.net_if_addrs()
    return next(str(name) for name, addresses in found.items() if any(each.address == host for each in addresses))


def free_port(host: str) -> int:
    """A TCP port that nobody uses now."""
    with contextlib.closing(socket.create_server((host, 0))) as server:
        return int(server.getsockname()[1])


if __name__ == "__main__":
    main()
