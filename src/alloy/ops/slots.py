"""Reading and writing rows of slot-major states in place."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

Rows = Tensor | slice | None


def check_slots(slots: Tensor | None, state: Tensor, batch: int) -> None:
    """Refuse what can be seen without reading numbers: rows without a place, numbers that are not one for each row.

    Args:
        slots: int (batch,); None: rows in order
        state: (slots, ...)
        batch: rows of the input
    """
    if slots is None:
        if batch > state.shape[0]:
            raise ValueError(f"batch = {batch} rows, but the state has {state.shape[0]} slots")
    elif slots.shape != (batch,):
        raise ValueError(f"slots is {tuple(slots.shape)}; expected one number for each row, ({batch},)")
    elif slots.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"slots is {slots.dtype}; slot numbers are int32 or int64")


def slot_numbers(slots: Tensor | None, state: Tensor, batch: int) -> list[int]:
    """The state row of each batch row, -1 for none; refuses numbers past the end and a slot that is used twice.

    It reads the numbers on the host: kernels for accelerators trust their caller instead.

    Args:
        slots: int (batch,); None: rows in order
        state: (slots, ...)
        batch: rows of the input
    """
    check_slots(slots, state, batch)
    if slots is None:
        return list(range(batch))
    numbers: list[int] = slots.tolist()
    taken = [slot for slot in numbers if slot >= 0]
    if len(set(taken)) != len(taken):
        raise ValueError(f"slots = {numbers}: a slot is used twice; each row needs a state of its own")
    if any(slot >= state.shape[0] or slot < -1 for slot in numbers):
        raise ValueError(f"slots = {numbers}, but the state has {state.shape[0]} slots; -1 marks a row without one")
    return numbers


def used_rows(slots: Tensor | None, state: Tensor, batch: int) -> tuple[Rows, Tensor | None]:
    """(rows, used): the state row of each batch row that has one, and the numbers of those batch rows.

    (None, None) when `slots` is None: batch row b uses state row b. `used` is None when every batch row has a slot; `rows` is
    a slice where slots follow each other.
    """
    numbers = slot_numbers(slots, state, batch)
    if slots is None:
        return None, None
    if min(numbers, default=0) >= 0:
        return consecutive(numbers) or slots.long(), None
    used = (slots >= 0).nonzero()[:, 0]
    return slots[used].long(), used


def consecutive(numbers: Sequence[int]) -> slice | None:
    """The slice of slots that follow each other, or None."""
    if not numbers or numbers[0] < 0 or any(b != a + 1 for a, b in pairwise(numbers)):
        return None
    return slice(numbers[0], numbers[-1] + 1)


def read_slots(state: Tensor, rows: Rows, batch: int) -> Tensor:
    """The rows of `state` (slots, ...) as (rows, ...): a view of the first `batch` for None and of a slice, else a copy."""
    return state[:batch] if rows is None else state[rows]


def write_slots(state: Tensor, rows: Rows, new: Tensor) -> None:
    """Write `new` (rows, ...) into `state` (slots, ...) in place; None: the first rows in order."""
    if not isinstance(rows, Tensor):
        state[slice(new.shape[0]) if rows is None else rows].copy_(new)
    else:
        state.index_copy_(0, rows, new.to(state.dtype))
