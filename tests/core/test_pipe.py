"""Messages over a socket, however they are cut, and a process at its other end."""

import os
import signal
import socket
import time
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alloy.core.pipe import Unpacker, beside, packed, receive, send

VALUES = st.recursive(st.none() | st.integers() | st.text() | st.binary(), st.lists, max_leaves=10)


@given(st.lists(VALUES, max_size=6), st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_messages_are_whole_however_they_are_cut(messages: list[Any], sizes: list[int]) -> None:
    data = b"".join(map(packed, messages))
    unpacker, found, i = Unpacker(), [], 0
    while data:
        size = sizes[i % len(sizes)]
        found += unpacker.feed(data[:size])
        data, i = data[size:], i + 1
    assert found == messages


def test_large_messages_and_the_end() -> None:
    """Far more than a socket holds; half a message at the end is none."""
    here, there = socket.socketpair()
    wanted = [list(range(1_000_000)), "x"]

    def work() -> None:
        with there:
            for message in wanted:
                send(there, message)
            there.sendall(packed("cut")[:5])

    thread = Thread(target=work)
    thread.start()
    with here:
        assert [receive(here), receive(here)] == wanted
        thread.join()
        with pytest.raises(EOFError):
            receive(here)


def test_sending_to_nobody_is_no_error() -> None:
    here, there = socket.socketpair()
    there.close()
    with here:
        send(here, "x")


def _echo(pipe: socket.socket, word: str) -> None:
    send(pipe, (word, os.getpid()))
    while True:
        send(pipe, receive(pipe))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
@pytest.mark.multi
def test_a_process_answers_through_signals_and_ends_with_the_context() -> None:
    with beside("echo", _echo, "hello") as (process, pipe):
        word, pid = receive(pipe)
        assert (word, pid) == ("hello", process.pid)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
            send(pipe, number)
            assert receive(pipe) == number
    assert not is_alive(pid)
    assert process.exitcode == -signal.SIGKILL
    # here they count again
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT, signal.SIGTERM}


def _leave(pipe: socket.socket) -> None:
    pass


@pytest.mark.slow
@pytest.mark.multi
def test_a_process_that_ends_closes_the_socket() -> None:
    start = time.monotonic()
    with beside("leave", _leave) as (process, pipe):
        with pytest.raises(EOFError):
            receive(pipe)
        process.join()
        assert process.exitcode == 0
    assert time.monotonic() - start < 30
