"""Messages between a communicator and its workers: framing, partial reads, broken streams."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import threading

import numpy as np
import pytest

from ep_mojo.comm.channel import MAX_PARTS, U64, Channel, ChannelError
from ep_mojo.comm.signals import deferred


@pytest.fixture
def pair():
    a, b = (Channel(s) for s in socket.socketpair())
    yield a, b
    a.close()
    b.close()


class Recorder:
    """A socket that keeps what is sent."""

    def __init__(self):
        self.bytes = bytearray()

    def send(self, part, flags):
        self.bytes += part
        return len(part)


def frame(message) -> bytes:
    recorder = Recorder()
    Channel(recorder).send(message)
    return bytes(recorder.bytes)


@pytest.mark.parametrize("n", [0, 1, 100, 1 << 15], ids=lambda n: f"{8 * n}_bytes")
def test_a_message_arrives_whole_however_it_is_cut(pair, n):
    sender, receiver = pair
    message = {"array": np.arange(n, dtype=np.float64), "text": "x" * 10}
    data = frame(message)
    assert receiver.receive(wait=False) is None
    for start in range(0, len(data) - 1, max(1, len(data) // 37)):
        end = min(start + max(1, len(data) // 37), len(data) - 1)
        sender.sock.sendall(data[start:end])
        assert receiver.receive(wait=False) is None
    sender.sock.sendall(data[-1:])
    got = Channel.decode(receiver.receive())
    np.testing.assert_array_equal(got["array"], message["array"])
    assert got["array"].flags.writeable
    assert receiver.receive(wait=False) is None


def test_messages_keep_their_order(pair):
    sender, receiver = pair
    for i in range(50):
        sender.send(i)
    assert [Channel.decode(receiver.receive()) for _ in range(50)] == list(range(50))


def test_descriptors_follow_their_message(pair):
    sender, receiver = pair
    r, w = os.pipe()
    sender.send("take", fds=[w])
    os.close(w)
    assert Channel.decode(receiver.receive()) == "take"
    (fd,) = receiver.receive_fds(1)
    os.write(fd, b"through")
    os.close(fd)
    assert os.read(r, 10) == b"through"
    os.close(r)
    sender.send("next")
    assert Channel.decode(receiver.receive()) == "next"


@pytest.mark.parametrize("part", [0, 4, 20], ids=["nothing", "half_a_number", "half_a_message"])
def test_the_end_of_the_stream_is_an_error_for_good(pair, part):
    sender, receiver = pair
    sender.sock.sendall(frame("message")[:part])
    sender.close()
    for _ in range(2):
        with pytest.raises(ChannelError):
            receiver.receive()
    with pytest.raises(ChannelError):
        receiver.send("anyone?")


def test_garbage_is_an_error(pair):
    sender, receiver = pair
    sender.sock.sendall(U64.pack(1 << 40))
    with pytest.raises(ChannelError, match="not a message"):
        receiver.receive()
    assert receiver.broken


def test_what_cannot_be_pickled_leaves_the_stream_in_order(pair):
    sender, receiver = pair
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        sender.send(lambda: None)
    sender.send("fine")
    assert Channel.decode(receiver.receive()) == "fine"


def test_messages_are_counted(pair):
    sender, receiver = pair
    sender.send("one")
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        sender.send(lambda: None)
    assert sender.posted == 1
    receiver.close()
    with pytest.raises(ChannelError):
        sender.send("x" * (1 << 20))
    assert sender.broken


def test_an_exception_in_the_middle_breaks_the_channel():
    class Interrupted(Recorder):
        def send(self, part, flags):
            raise KeyboardInterrupt

    channel = Channel(Interrupted())
    with pytest.raises(KeyboardInterrupt):
        channel.send("x")
    with pytest.raises(ChannelError, match="broken"):
        channel.send("y")


class Signals:
    """A socket whose every call is followed by a signal, before its caller knows what the call did."""

    def __init__(self, sock):
        self.sock = sock

    def __getattr__(self, name):
        call = getattr(self.sock, name)
        if name not in ("send", "recv_into", "sendmsg"):
            return call

        def and_signal(*args):
            try:
                return call(*args)
            finally:
                signal.raise_signal(signal.SIGINT)

        return and_signal


def interrupted_until_done(call):
    """Call until it is not interrupted; how often it was."""
    for n in range(10_000):
        try:
            call()
            return n
        except KeyboardInterrupt:
            pass
    raise AssertionError("it never ends")


def test_an_interrupt_cuts_no_message_that_is_sent(pair):
    sender, receiver = pair
    data = np.arange(1 << 20, dtype=np.int32)
    sender.sock = Signals(sender.sock)
    sender.post(("first", data))
    sender.post("second")
    got = []
    reader = threading.Thread(target=lambda: got.extend(Channel.decode(receiver.receive()) for _ in range(2)))
    reader.start()
    assert interrupted_until_done(sender.flush) > 1
    reader.join(20)
    assert got[0][0] == "first"
    np.testing.assert_array_equal(got[0][1], data)
    assert got[1] == "second"


def test_an_interrupt_loses_no_byte_that_is_received(pair):
    sender, receiver = pair
    receiver.sock = Signals(receiver.sock)
    data = frame({"array": np.arange(100)})
    got = []

    def receive():
        with deferred():  # as a worker's parent does: what was received must also be kept
            got.append(receiver.receive(wait=False))

    for byte in range(0, len(data), 10):
        sender.sock.sendall(data[byte : byte + 10])
        with pytest.raises(KeyboardInterrupt):
            receive()
    assert got[:-1] == [None] * (len(got) - 1)
    np.testing.assert_array_equal(Channel.decode(got[-1])["array"], np.arange(100))


def test_a_message_that_nobody_reads_can_be_interrupted_and_finished(pair):
    sender, receiver = pair

    class Enough(Exception):
        pass

    def look():
        raise Enough

    sender.post(np.zeros(1 << 22, np.uint8))
    with pytest.raises(Enough):
        sender.flush(look)
    assert sender.pending
    got = []
    reader = threading.Thread(target=lambda: got.append(Channel.decode(receiver.receive())))
    reader.start()
    sender.flush()
    reader.join(20)
    assert got[0].nbytes == 1 << 22
    assert not sender.pending


def test_more_arrays_than_a_frame_has_parts(pair):
    sender, receiver = pair
    got = []
    reader = threading.Thread(target=lambda: got.append(Channel.decode(receiver.receive())))
    reader.start()
    sender.send([np.full(1, i) for i in range(MAX_PARTS)])
    reader.join(60)
    assert [int(a[0]) for a in got[0]] == list(range(MAX_PARTS))
    got[0][0][0] = 1  # writable


def test_deferred_handlers_run_at_the_end_and_only_there():
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append("usr1"))
    try:
        with pytest.raises(KeyboardInterrupt), deferred():
            with deferred():
                signal.raise_signal(signal.SIGUSR1)
                signal.raise_signal(signal.SIGINT)
            seen.append("inner end")
            assert seen == ["inner end"]
        assert seen == ["inner end", "usr1"]
        signal.raise_signal(signal.SIGUSR1)
        assert seen == ["inner end", "usr1", "usr1"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGUSR1, before)
