"""Hosts of a network in memory whose handlers must not fail: a host by itself would keep what they raise to itself."""

from __future__ import annotations

from asyncio import StreamReader, StreamWriter

from p2pllm.testing import MemoryHost


def watch(host: MemoryHost, method: str) -> list[Exception]:
    """What the handler of this host's streams raises from now on."""
    failures, handler = list[Exception](), host.streams[method]

    async def watched(peer: str, reader: StreamReader, writer: StreamWriter) -> None:
        try:
            await handler(peer, reader, writer)
        except Exception as error:  # noqa: BLE001 - whatever it is, the target shall raise it
            failures.append(error)

    host.streams[method] = watched
    return failures
