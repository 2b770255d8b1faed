"""Messages over a Unix socket: pickles whose arrays travel beside them, and file descriptors.

A frame: u64 number of parts, u64 bytes of each part, the parts. Part 0 is the pickle, the others its out-of-band
buffers. Reading can stop anywhere and go on later, so that one process can listen to many. Sending cannot: it waits
until the other end reads, so never send to one that may be sending itself.
"""

from __future__ import annotations

import pickle
import socket
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

MAX_PARTS = 1 << 16
SMALL = 1 << 16
"""Messages of fewer bytes are joined and sent at once."""
U64 = struct.Struct("<Q")


class ChannelError(ConnectionError):
    """The other end is gone, or the stream was cut in the middle of a message by an exception here."""


class Channel:
    """One end of a stream of messages.

    Attributes:
        sock: The socket.
        sent: Messages sent whole.
        broken: The other end is gone, or an exception cut a message in the middle; nothing can follow.
    """

    def __init__(self, sock: socket.socket):
        self.sock = sock
        self.sent = 0
        self.broken = False
        self._expect(bytearray(U64.size))

    def fileno(self) -> int:
        """The socket's descriptor, for selectors."""
        return self.sock.fileno()

    def close(self) -> None:
        """Close the socket; the other end reads the end of the stream."""
        self.sock.close()

    def send(self, message: Any, fds: Sequence[int] = ()) -> None:
        """Send one message, waiting as long as the other end reads it, and then file descriptors.

        Raises:
            ChannelError: The other end is gone.
            Exception: The message cannot be pickled; nothing was sent.
        """
        buffers: list[pickle.PickleBuffer] = []
        parts = [pickle.dumps(message, protocol=5, buffer_callback=buffers.append)]
        parts += [b.raw() for b in buffers]
        head = b"".join(U64.pack(n) for n in (len(parts), *map(len, parts)))
        if sum(map(len, parts)) < SMALL:
            head, parts = b"".join((head, *parts)), []
        with self._whole():
            self.sock.sendall(head)
            for part in parts:
                self.sock.sendall(part)
            if fds:
                socket.send_fds(self.sock, [b"F"], list(fds))
            self.sent += 1

    def receive(self, wait: bool = True) -> list[Any] | None:
        """The parts of the next message (for `decode`), or None where it is not all there yet and `wait` is False.

        Raises:
            ChannelError: The other end is gone.
        """
        flags = 0 if wait else socket.MSG_DONTWAIT
        while True:
            while self._next < len(self._parts):
                view = memoryview(self._parts[self._next])[self._filled :]
                if len(view) == 0:
                    self._next, self._filled = self._next + 1, 0
                    continue
                with self._whole():
                    try:
                        n = self.sock.recv_into(view, 0, flags)
                    except BlockingIOError:
                        return None
                    self._filled += n
                if n == 0:
                    self.broken = True
                    raise ChannelError("the other end is gone")
            done = self._parts
            if self._stage == 0:
                (n_parts,) = U64.unpack(done[0])
                if not 1 <= n_parts <= MAX_PARTS:
                    self.broken = True
                    raise ChannelError(f"not a message: {n_parts} parts")
                self._expect(*(bytearray(U64.size) for _ in range(n_parts)), stage=1)
            elif self._stage == 1:
                self._expect(*(np.empty(U64.unpack(p)[0], np.uint8) for p in done), stage=2)
            else:
                self._expect(bytearray(U64.size))
                return done

    def receive_fds(self, n: int) -> list[int]:
        """The `n` descriptors that came with the message just received."""
        with self._whole():
            _, fds, _, _ = socket.recv_fds(self.sock, 1, n)
        return list(fds)

    @staticmethod
    def decode(parts: list[Any]) -> Any:
        """The object in a message. Arrays in it are writable and own their memory."""
        return pickle.loads(parts[0], buffers=parts[1:])

    def _expect(self, *parts: Any, stage: int = 0) -> None:
        self._stage, self._parts, self._next, self._filled = stage, list(parts), 0, 0

    def _whole(self) -> _Whole:
        return _Whole(self)


class _Whole:
    """Marks a channel broken if an exception (a Ctrl-C, say) cuts what is inside."""

    def __init__(self, channel: Channel):
        self.channel = channel

    def __enter__(self) -> None:
        if self.channel.broken:
            raise ChannelError("the connection is broken")
        self.channel.broken = True

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.channel.broken = False
        elif issubclass(kind, OSError) and not issubclass(kind, ChannelError):
            raise ChannelError(str(error)) from error
