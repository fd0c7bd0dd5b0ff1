"""The control protocol against a p2pd that the test plays."""

import asyncio

import pytest
from hivemind.p2p import PeerID
from hivemind.proto import p2pd_pb2 as pb

from p2pllm.errors import NetworkError, UnreachableError
from p2pllm.identity import Identity
from p2pllm.network.control import Control
from p2pllm.network.streams import Traffic, UnixServer
from p2pllm.network.wire import failure, read_message, write_message

PEER = PeerID.from_base58(Identity.generate().peer_id)


class FakeP2pd:
    """Takes one persistent connection and hands the requests to the test."""

    def __init__(self, folder):
        self.control_socket, self.stream_socket = folder / "d.sock", folder / "c.sock"
        self.requests = asyncio.Queue()
        self.server = UnixServer(self.control_socket, self._accept)

    async def _accept(self, reader, writer):
        self.writer = writer
        await read_message(reader, pb.Request())
        await write_message(writer, pb.Response(type=pb.Response.OK))
        while True:
            self.requests.put_nowait(await read_message(reader, pb.PersistentConnectionRequest()))

    async def reply(self, request, **fields):
        await write_message(self.writer, pb.PersistentConnectionResponse(callId=request.callId, **fields))


@pytest.fixture
async def fake(tmp_path):
    made = FakeP2pd(tmp_path)
    await made.server.start()
    made.control = await Control.open(made.control_socket, made.stream_socket, Traffic())
    yield made
    await made.control.close()
    await made.server.close()
    assert list(tmp_path.iterdir()) == []


def call(fake, data=b"x"):
    return asyncio.create_task(fake.control.call_unary_handler(PEER, "m", data))


async def answered(fake, task, data):
    request = await fake.requests.get()
    await fake.reply(request, callUnaryResponse=pb.CallUnaryResponse(response=data))
    return await task


async def test_reply_to_a_cancelled_call_harms_nobody(fake):
    task = call(fake)
    request = await fake.requests.get()
    # the reply and the cancellation meet in the same turn of the loop
    await fake.reply(request, callUnaryResponse=pb.CallUnaryResponse(response=b"late"))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await fake.requests.get()).HasField("cancel")
    await fake.reply(request, callUnaryResponse=pb.CallUnaryResponse(response=b"later still"))
    assert await answered(fake, call(fake), b"fine") == b"fine"


async def test_future_done_but_not_yet_collected(fake):
    task = call(fake)
    request = await fake.requests.get()
    future = next(iter(fake.control._pending.values()))
    future.cancel()
    fake.control._dispatch(
        pb.PersistentConnectionResponse(callId=request.callId, callUnaryResponse=pb.CallUnaryResponse(response=b"x"))
    )
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_death_of_p2pd_fails_what_waits(fake):
    tasks = [call(fake) for _ in range(3)]
    await fake.requests.get()
    fake.writer.transport.abort()
    for task in tasks:
        with pytest.raises(NetworkError, match="p2pd has stopped"):
            await task
    assert fake.control.lost.is_set()
    with pytest.raises(NetworkError, match="p2pd has stopped"):
        await call(fake)


async def test_garbage_of_p2pd_is_the_end_of_it(fake):
    task = call(fake)
    await fake.requests.get()
    fake.writer.write(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff")
    with pytest.raises(NetworkError):
        await task


async def test_handler_errors_and_cancelled_handlers(fake):
    started = asyncio.Event()

    async def handler(data, caller):
        if data == b"wait":
            started.set()
            await asyncio.Event().wait()
        if data == b"bad":
            raise KeyError("secret" * 100)
        return data + caller.to_base58().encode()

    adding = asyncio.create_task(fake.control.add_unary_handler("m", handler))
    await fake.reply(await fake.requests.get())
    await adding
    ids = {data: bytes([number]) * 16 for number, data in enumerate((b"hi", b"bad", b"wait"))}
    for data, call_id in ids.items():
        request = pb.CallUnaryRequest(peer=PEER.to_bytes(), proto="m", data=data)
        await write_message(fake.writer, pb.PersistentConnectionResponse(callId=call_id, requestHandling=request))
    replies = [await fake.requests.get() for _ in range(2)]
    by_id = {bytes(reply.callId): reply.unaryResponse for reply in replies}
    assert by_id[ids[b"hi"]].response == b"hi" + PEER.to_base58().encode()
    assert 0 < len(by_id[ids[b"bad"]].error) <= 200
    await started.wait()
    await write_message(fake.writer, pb.PersistentConnectionResponse(callId=ids[b"wait"], cancel=pb.Cancel()))
    assert await answered(fake, call(fake), b"ok") == b"ok"
    assert not fake.control._answering


@pytest.mark.parametrize(
    ("message", "kind", "says"),
    [
        ("failed to dial X: all dials failed\n  * [/ip4/1.2.3.4/tcp/1] dial tcp4: connect: connection refused",
         UnreachableError, "connection refused"),
        ("failed to dial: no addresses", UnreachableError, "no address"),
        ("failed to find any peer in table", UnreachableError, "no address"),
        ("stream reset", UnreachableError, "lost"),
        ("failed to negotiate protocol: protocols not supported: [x]", NetworkError, "does not offer"),
        ("something else\nin two lines", NetworkError, "something else"),
    ],
)  # fmt: skip
def test_errors_are_one_sentence(message, kind, says):
    error = failure(PEER, message)
    assert type(error) is kind and says in str(error) and "\n" not in str(error)
