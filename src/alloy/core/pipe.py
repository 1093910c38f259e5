"""Messages between two ends of a socket, and a process at the other end of one."""

import pickle
import signal
import socket
import struct
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context, resource_tracker
from multiprocessing.context import SpawnProcess
from multiprocessing.util import Finalize
from typing import Any

# bytes of the message behind it
HEAD = struct.Struct("!Q")
# from a terminal they reach all its processes
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def packed(message: object) -> bytes:
    """A message as it goes over a socket."""
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return HEAD.pack(len(data)) + data


def send(pipe: socket.socket, message: object) -> None:
    """Send one message, once there is room for it; nothing happens if there is no other end any more."""
    with suppress(ConnectionError):
        pipe.sendall(packed(message))


def receive(pipe: socket.socket) -> Any:
    """Wait for the next message; EOFError: there is no other end any more; TimeoutError: the socket's limit is over."""
    head = _exactly(pipe, HEAD.size)
    return pickle.loads(_exactly(pipe, HEAD.unpack(head)[0]))


def _exactly(pipe: socket.socket, size: int) -> bytes:
    # one call is enough, but for a socket with a time limit, which gives what is there
    data = pipe.recv(size, socket.MSG_WAITALL)
    while len(data) < size:
        more = pipe.recv(size - len(data), socket.MSG_WAITALL)
        if not more:
            raise EOFError
        data += more
    return data


class Unpacker:
    """Messages out of the bytes of a socket, however they are cut."""

    def __init__(self) -> None:
        # what is behind the last whole message
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """The messages that end in `data`."""
        self._rest += data
        while len(self._rest) >= HEAD.size:
            end = HEAD.size + HEAD.unpack_from(self._rest)[0]
            if len(self._rest) < end:
                return
            message = self._rest[HEAD.size : end]
            del self._rest[:end]
            yield pickle.loads(message)


@contextmanager
def beside(name: str, target: Callable[..., None], *arguments: object) -> Generator[tuple[SpawnProcess, socket.socket]]:
    """A new process, and the end of a socket that leads to it; killed when the context ends.

    Ctrl-C and SIGTERM do not end it: this process alone answers them.

    Args:
        name: of the process
        target: called there with its end of the socket and what follows
        *arguments: that can be pickled
    """
    here, there = socket.socketpair()
    process = get_context("spawn").Process(name=name, target=target, args=(there, *arguments))
    # or it is started below, and lets signals through again
    resource_tracker.ensure_running()
    with here:
        with there:
            held = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, held)
        # a context that nobody ends, as in an object that is never closed, must not keep this process from ending
        end = Finalize(None, process.kill, exitpriority=0)
        try:
            yield process, here
        finally:
            end.cancel()
            process.kill()
            process.join()
