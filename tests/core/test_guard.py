import os
import signal
import subprocess
import sys
import time

import pytest

from alloy.core.guard import CallError, Guard


def misbehave(how: str) -> object:
    """What a guarded function may do."""
    if how == "hang":
        while True:
            time.sleep(1)
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "eat":
        return len(bytearray(1 << 34))
    if how == "raise":
        raise ValueError("no such thing")
    if how == "large":
        return "x" * 5_000_001
    return os.getpid()


@pytest.mark.multi
def test_a_bad_call_costs_itself_alone() -> None:
    """Whatever a call does, the next one is answered."""
    with Guard("test_guard:misbehave", timeout_s=1.0, memory_bytes=2 << 30, calls=50) as guard:
        first = guard("pid")
        assert first == guard("pid") != os.getpid()
        for how, kind in (("hang", "timeout"), ("die", "killed"), ("eat", "killed")):
            with pytest.raises(CallError) as caught:
                guard(how)
            assert caught.value.kind == kind
            assert guard("pid") not in (first, os.getpid())
        alive = guard("pid")
        with pytest.raises(CallError, match="ValueError: no such thing"):
            guard("raise")
        assert guard("pid") == alive
        assert len(guard("large")) == 5_000_001


@pytest.mark.multi
def test_a_child_is_replaced_after_so_many_calls() -> None:
    """And what cannot be imported is said at the first call."""
    with Guard("test_guard:misbehave", timeout_s=5.0, memory_bytes=2 << 30, calls=2) as guard:
        pids = [guard("pid") for _ in range(5)]
    assert pids[0] == pids[1] != pids[2] == pids[3] != pids[4]
    with Guard("test_guard:nothing", timeout_s=5.0, memory_bytes=2 << 30) as guard, pytest.raises(AttributeError):
        guard("pid")


@pytest.mark.multi
def test_a_guard_that_nobody_closes_lets_its_process_end() -> None:
    """Neither the process nor the child stays."""
    code = (
        "from alloy.core.guard import Guard\n"
        "if __name__ == '__main__':\n"
        "    guard = Guard('os:getpid', timeout_s=5.0, memory_bytes=2 << 30)\n"
        "    print(guard(), flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)
