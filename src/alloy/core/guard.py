"""A function called in a child process, which is killed when a call takes too long or too much memory.

For input that nobody vouches for: a hostile page costs its own call, not the run. The child is kept from call to call.
"""

import importlib
import resource
import socket
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal, Self

from alloy.core.pipe import beside, receive, send

# importing what the child needs may take this long
START_S = 120.0


class CallError(Exception):
    """A guarded call without a result: it timed out, its process was killed, or it raised; then `message` is the error."""

    def __init__(self, kind: Literal["timeout", "killed", "error"], message: str) -> None:
        super().__init__(message)
        self.kind: Literal["timeout", "killed", "error"] = kind


class Guard:
    """Calls `target` in a child process.

    Args:
        target: "module:function"; arguments and results are pickled
        timeout_s: of a call
        memory_bytes: address space of the child
        calls: after so many the child is replaced, so that nothing piles up in it
        first: arguments of a call made before all others and without their limit of time, so that what the function
            loads at its first call costs no other call
    """

    def __init__(
        self,
        target: str,
        timeout_s: float,
        memory_bytes: int,
        calls: int = 20_000,
        first: tuple[object, ...] | None = None,
    ) -> None:
        self.target, self.timeout_s, self.memory_bytes, self.calls = target, timeout_s, memory_bytes, calls
        self.first = first
        self._stack = ExitStack()
        self._pipe: socket.socket | None = None
        self._left = 0

    def __call__(self, *arguments: object) -> Any:
        """The function's result; CallError without one."""
        if self._pipe is None or self._left == 0:
            self.close()
            self._start()
        pipe = self._pipe
        assert pipe is not None, "a started child has a pipe"
        self._left -= 1
        try:
            send(pipe, arguments)
            kind, value = receive(pipe)
        except TimeoutError:
            self.close()
            raise CallError("timeout", f"no result after {self.timeout_s:g} s") from None
        except (EOFError, ConnectionError):
            self.close()
            raise CallError("killed", f"its process died (limit {self.memory_bytes >> 20} MiB)") from None
        if kind == "memory":
            # what the failed call left behind must not fail the next one
            self.close()
            raise CallError("killed", f"out of memory (limit {self.memory_bytes >> 20} MiB)")
        if kind == "error":
            raise CallError("error", value)
        return value

    def close(self) -> None:
        """End the child."""
        self._stack.close()
        self._pipe = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        _, pipe = self._stack.enter_context(beside("guarded", _serve, self.target, self.memory_bytes, self.first))
        pipe.settimeout(START_S)
        try:
            failure = receive(pipe)
        except (EOFError, ConnectionError, TimeoutError) as error:
            self.close()
            raise CallError("killed", f"the process for {self.target} did not start") from error
        if failure is not None:
            self.close()
            raise failure
        pipe.settimeout(self.timeout_s)
        self._pipe, self._left = pipe, self.calls


def _serve(pipe: socket.socket, target: str, memory_bytes: int, first: tuple[object, ...] | None) -> None:
    """The child: calls until its parent is gone."""
    module, _, name = target.partition(":")
    try:
        function: Callable[..., object] = getattr(importlib.import_module(module), name)
        if first is not None:
            function(*first)
    except Exception as error:
        send(pipe, error)
        return
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, resource.getrlimit(resource.RLIMIT_AS)[1]))
    # a crash in it would otherwise fill the disk
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    send(pipe, None)
    while True:
        try:
            arguments = receive(pipe)
        except EOFError:
            return
        try:
            answer = ("result", function(*arguments))
        except MemoryError:
            answer = ("memory", None)
        except Exception as error:
            answer = ("error", f"{type(error).__name__}: {error}")
        send(pipe, answer)
