"""A worker process of `Communicator.processes`: one rank, driven by its parent over a socket.

The process ends when the socket closes, whatever it is doing: a thread watches for that. Named errors go back
as themselves.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import os
import pickle
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..config import EPConfig
from ..errors import ConfigError, EPError, UnsupportedError
from . import shm
from .base import CompiledGraph
from .channel import Channel, ChannelError
from .launcher import LOST_REMEDY
from .models import load_artefact, load_graphs
from .one_rank import OneRankCommunicator

if TYPE_CHECKING:
    from max.engine import Model
    from max.graph import Graph

inside_worker = False
"""Whether this process is a worker."""


@dataclass(frozen=True)
class FunctionRef:
    """A module-level function, found again in a worker by its module's name or file."""

    module: str
    name: str
    file: str

    def load(self) -> Callable[..., Any]:
        """Import the function.

        Raises:
            ImportError, AttributeError: It cannot be imported by name nor from its file.
        """
        target: Any = self._module()
        for part in self.name.split("."):
            target = getattr(target, part)
        return target

    def _module(self) -> Any:
        if self.module != "__main__":
            try:
                return importlib.import_module(self.module)
            except ModuleNotFoundError:
                pass
        alias = f"ep_mojo_worker:{self.file}"
        if alias not in sys.modules:
            spec = importlib.util.spec_from_file_location(alias, self.file)
            if spec is None or spec.loader is None:
                raise ImportError(f"module {self.module} has no importable file ({self.file})")
            sys.modules[alias] = module = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[alias]
                raise
        return sys.modules[alias]


class WorkerCommunicator(OneRankCommunicator):
    """The communicator inside a worker: what functions given to `run` get. It is one rank.

    Attributes:
        rank: This process's rank.
        memories: All ranks' windows, mapped here; `memories[rank]` are its own.
    """

    loads_models = None
    lost_remedy = LOST_REMEDY

    def __init__(self, cfg: EPConfig, rank: int, group: int, fds: Sequence[int], models: dict[int, Any]):
        """Map the blocks of all ranks, and check that all were made for this config."""
        super().__init__(cfg, rank)
        self.memories = [shm.attach(fd, cfg, r, group, rank) for r, fd in enumerate(fds)]
        self._own.check_head()
        self._models = models

    def compile_all(self, graphs: Sequence[Graph]) -> list[CompiledGraph]:
        """Compile graphs in this process. The parent's `compile_all` does it once for all."""
        self._live()
        return load_graphs(self.session, graphs, [self._check_graph(g) for g in graphs])

    def load(self, model: CompiledGraph) -> Model:
        """The MAX model of a graph that the parent compiled."""
        loaded = self._models.get(model.key) if model.model is None else model.model
        if loaded is None:
            raise ConfigError(
                "this worker does not have the graph",
                field="model",
                value=model.name,
                allowed="a graph compiled by this communicator",
                remedy="compile it again with comm.compile(graph)",
            )
        return loaded

    def reset(self) -> None:
        """Not here: all ranks are reset together.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError("reset() inside a worker", remedy="call reset() of the parent's communicator")


class Server:
    """Answers the parent's requests, one after the other."""

    def __init__(self, channel: Channel):
        self.channel = channel
        self.comm: WorkerCommunicator | None = None
        self.models: dict[int, Any] = {}

    def serve(self) -> None:
        """Until the parent is gone."""
        for number in itertools.count(1):
            try:
                parts = self.channel.receive()
                self._reply(number, *self._answer(parts))
            except ChannelError:
                return

    def _answer(self, parts: Any) -> tuple[bool, Any]:
        try:
            _, verb, payload = self.channel.decode(parts)
        except BaseException as e:
            return False, EPError(
                f"the request cannot be unpickled in the worker: {type(e).__name__}: {text_of(e)}",
                remedy="define the classes of what you pass in a module that can be imported, not in __main__",
            )
        try:
            return True, getattr(self, f"do_{verb}")(*payload)
        except ChannelError:
            raise
        except BaseException as e:
            return False, portable(e)

    def _reply(self, number: int, ok: bool, value: Any) -> None:
        try:
            self.channel.send((number, ok, value))
        except ChannelError:
            raise
        except Exception as e:
            text = f"the result cannot be sent back: {type(e).__name__}: {text_of(e)}"
            self.channel.send((number, False, EPError(text)))

    def do_attach(self, cfg: EPConfig, rank: int, group: int) -> int:
        """Become `rank`; the descriptors of all blocks follow. Returns the process id."""
        fds = self.channel.receive_fds(cfg.n_ranks)
        try:
            if self.comm is not None:
                self.comm.destroy()
                self.comm = None
            self.comm = WorkerCommunicator(cfg, rank, group, fds, self.models)
        finally:
            shm.close_all(fds)
        return os.getpid()

    def do_warm(self) -> None:
        """Import what `load` will need, while the parent compiles."""
        _ = self.comm.session

    def do_load(self, names: dict[int, str], artefact: bytes) -> None:
        """Make compiled graphs ready to run. `names`: the graph of each key."""
        models = load_artefact(self.comm.session, artefact, list(names.values()))
        self.models |= dict(zip(names, models, strict=True))

    def do_execute(self, model: CompiledGraph, args: list[Any], check: bool) -> list[Any]:
        """Run a graph on this rank."""
        return self.comm.execute(model, *args, check=check)

    def do_run(self, function: FunctionRef, args: bytes) -> Any:
        """Call a user's function. `args` is a pickle of its own: its classes may come with the function's module."""
        call = function.load()
        return call(self.comm, *pickle.loads(args))


def portable(error: BaseException, where: str = "a worker") -> Exception:
    """`error` as something that another process can unpickle, with the traceback as a note. Never raises.

    `where`: what the text calls this process.
    """
    trace = ""
    with contextlib.suppress(BaseException):  # whatever the methods of a user's class do
        trace = "".join(traceback.format_exception(error)).rstrip()
        if isinstance(error, Exception):
            error.add_note(f"In {where}, process {os.getpid()}:\n{trace}")
            again = pickle.loads(pickle.dumps(error))
            if type(again) is type(error) and str(again) == str(error):
                return error
    return EPError(f"{type(error).__name__} in {where}: {text_of(error)}\n{trace}")


def text_of(error: BaseException) -> str:
    """`str(error)`, also where a class of the user's cannot say it."""
    try:
        return str(error)
    except BaseException as e:
        return f"(its text cannot be had: its __str__ raises {type(e).__name__})"


def watch(sock: socket.socket, parent: int) -> None:
    """End the process as soon as the other end of `sock` closes, or within a second of the end of its parent.

    A process that the parent forked may hold a copy of the other end, which then does not close.
    """
    poller = select.poll()
    poller.register(sock.fileno(), 0)  # hang-ups are always reported
    while os.getppid() == parent:
        if any(event & (select.POLLHUP | select.POLLERR | select.POLLNVAL) for _, event in poller.poll(1000)):
            break
    leave()


def leave() -> None:
    """End the process at once, without waiting for threads or ops."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(0)


def main(fd: int, parent: int) -> None:
    """Serve the process `parent` at the other end of the socket `fd` until it is gone."""
    global inside_worker
    inside_worker = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sock = socket.socket(fileno=fd)
    sock.set_inheritable(False)
    threading.Thread(target=watch, args=(sock, parent), name="ep-mojo-watch", daemon=True).start()
    Server(Channel(sock)).serve()
    leave()
