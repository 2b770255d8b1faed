"""Messages between a communicator and its workers: framing, partial reads, broken streams."""

from __future__ import annotations

import os
import pickle
import socket

import numpy as np
import pytest

from ep_mojo.comm.channel import U64, Channel, ChannelError


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

    def sendall(self, part):
        self.bytes += part


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


def test_messages_sent_whole_are_counted(pair):
    sender, receiver = pair
    sender.send("one")
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        sender.send(lambda: None)
    assert sender.sent == 1
    receiver.close()
    with pytest.raises(ChannelError):
        sender.send("x" * (1 << 20))
    assert sender.sent == 1


def test_an_interrupt_in_the_middle_breaks_the_channel():
    class Interrupted(Recorder):
        def sendall(self, part):
            raise KeyboardInterrupt

    channel = Channel(Interrupted())
    with pytest.raises(KeyboardInterrupt):
        channel.send("x")
    with pytest.raises(ChannelError, match="broken"):
        channel.send("y")
