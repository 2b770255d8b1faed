"""Messages over a Unix socket: pickles whose arrays travel beside them, and file descriptors.

A frame: u64 number of parts, u64 bytes of each part, the parts. Part 0 is the pickle, the others its out-of-band
buffers. Reading and writing can stop anywhere and go on later, so that one process can serve many, and an exception of
a signal handler (Ctrl-C) cuts no frame in two: what is left of it goes out before the next one. Never wait in `flush`
for an end that may be sending itself.
"""

from __future__ import annotations

import array
import pickle
import select
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from .signals import deferred

MAX_PARTS = 1 << 16
SMALL = 1 << 16
"""Messages of fewer bytes are joined and sent at once."""
TICK_S = 0.25
"""How often one who waits looks around."""
U64 = struct.Struct("<Q")


class ChannelError(ConnectionError):
    """The other end is gone, or an exception here cut the stream in the middle of a message."""


class Channel:
    """One end of a stream of messages.

    Attributes:
        sock: The socket.
        posted: Messages sent, or begun and to be finished by `flush`.
        broken: The other end is gone, or an exception cut a message in the middle; nothing can follow.
    """

    def __init__(self, sock: socket.socket):
        self.sock = sock
        self.posted = 0
        self.broken = False
        self._outgoing: deque[Any] = deque()  # bytes, and lists of descriptors
        self._expect(bytearray(U64.size))

    @property
    def pending(self) -> bool:
        """Whether something posted has not been sent yet."""
        return bool(self._outgoing)

    def fileno(self) -> int:
        """The socket's descriptor, for selectors."""
        return self.sock.fileno()

    def close(self) -> None:
        """Close the socket; the other end reads the end of the stream, also where a forked process has a copy."""
        with suppress(OSError):  # it has gone first, or this was closed before
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    def send(self, message: Any, fds: Sequence[int] = ()) -> None:
        """`post`, then `flush`; with their errors."""
        self.post(message, fds)
        self.flush()

    def post(self, message: Any, fds: Sequence[int] = ()) -> None:
        """Put one message, and then file descriptors, behind what is still to be sent. `push` or `flush` sends it.

        Raises:
            Exception: The message cannot be pickled; nothing was posted.
        """
        buffers: list[pickle.PickleBuffer] = []
        parts = [pickle.dumps(message, protocol=5, buffer_callback=buffers.append)]
        if len(buffers) < MAX_PARTS:
            parts += [b.raw() for b in buffers]
        else:
            parts = [pickle.dumps(message, protocol=5)]
        head = b"".join(U64.pack(n) for n in (len(parts), *map(len, parts)))
        if sum(map(len, parts)) < SMALL:
            head, parts = b"".join((head, *parts)), []
        items = [memoryview(p) for p in (head, *parts) if len(p)] + ([list(fds)] if fds else [])
        with deferred():
            self._outgoing.extend(items)
            self.posted += 1

    def push(self) -> bool:
        """Send as much as the other end takes now. Returns whether all has been sent.

        Raises:
            ChannelError: The other end is gone.
        """
        with self._whole():
            while self._outgoing:
                item = self._outgoing[0]
                try:
                    if isinstance(item, list):
                        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", item))
                        self.sock.sendmsg([b"F"], [rights], socket.MSG_DONTWAIT)
                        sent = len(item)
                    else:
                        sent = self.sock.send(item, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    return False
                if sent == len(item):
                    self._outgoing.popleft()
                else:
                    self._outgoing[0] = item[sent:]
        return True

    def flush(self, look: Callable[[], None] = lambda: None) -> None:
        """Send all that was posted, waiting as long as the other end reads it.

        Args:
            look: Called now and then while nothing can be sent. An exception of its own ends the waiting; what is left
                can be sent later.

        Raises:
            ChannelError: The other end is gone.
        """
        while not self.push():
            self._wait(select.POLLOUT, TICK_S)
            look()

    def receive(self, wait: bool = True) -> list[Any] | None:
        """The parts of the next message (for `decode`), or None where it is not all there yet and `wait` is False.

        Raises:
            ChannelError: The other end is gone.
        """
        while True:
            with self._whole():
                parts = self._read()
            if parts is not None or not wait:
                return parts
            self._wait(select.POLLIN, None)

    def _read(self) -> list[Any] | None:
        while True:
            while self._next < len(self._parts):
                view = memoryview(self._parts[self._next])[self._filled :]
                if len(view) == 0:
                    self._next, self._filled = self._next + 1, 0
                    continue
                try:
                    n = self.sock.recv_into(view, 0, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    return None
                self._filled += n
                if n == 0:
                    raise ChannelError("the other end is gone")
            done = self._parts
            if self._stage == 0:
                (n_parts,) = U64.unpack(done[0])
                if not 1 <= n_parts <= MAX_PARTS:
                    raise ChannelError(f"not a message: {n_parts} parts")
                self._expect(*(bytearray(U64.size) for _ in range(n_parts)), stage=1)
            elif self._stage == 1:
                self._expect(*(np.empty(U64.unpack(p)[0], np.uint8) for p in done), stage=2)
            else:
                self._expect(bytearray(U64.size))
                return done

    def receive_fds(self, n: int) -> list[int]:
        """The `n` descriptors that came with the message just received."""
        self._wait(select.POLLIN, None)
        with self._whole():
            _, fds, _, _ = socket.recv_fds(self.sock, 1, n)
        return list(fds)

    @staticmethod
    def decode(parts: list[Any]) -> Any:
        """The object in a message. Arrays in it are writable and own their memory."""
        return pickle.loads(parts[0], buffers=parts[1:])

    def _expect(self, *parts: Any, stage: int = 0) -> None:
        self._stage, self._parts, self._next, self._filled = stage, list(parts), 0, 0

    def _wait(self, event: int, seconds: float | None) -> None:
        if self.fileno() < 0:
            raise ChannelError("the connection was closed")
        poller = select.poll()
        poller.register(self.fileno(), event)
        poller.poll(None if seconds is None else 1000 * seconds)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Let no signal handler cut what is inside; mark the channel broken if anything else does."""
        if self.broken:
            raise ChannelError("the connection is broken")
        with deferred():
            self.broken = True
            try:
                yield
            except MemoryError:  # for the parts of a message: it can be tried again
                self.broken = False
                raise
            except ChannelError:
                raise
            except OSError as error:
                raise ChannelError(str(error)) from error
            self.broken = False
