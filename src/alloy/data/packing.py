"""Documents into rows of a fixed length, cut at document ends where that is possible.

Best fit puts every piece into the fullest row that still takes it, so rows hold whole documents and little padding;
documents longer than a row are cut into full rows and a rest. Concat lays documents end to end and cuts the stream.
Either way a token is in exactly one row. The label of a token is the next token of its document, also where the document
goes on in another row; the last token of a document and padding have none.

Paper: Fewer Truncations Improve Language Modeling (Ding et al., 2024), section 3. arXiv:2404.10830
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

IGNORE = -100
PADDING = -1


class Piece(NamedTuple):
    """Tokens start to stop of a document."""

    document: int
    start: int
    stop: int


class Documents(Protocol):
    """Token ids by document number."""

    def __getitem__(self, document: int, /) -> NDArray[np.integer]: ...


@dataclass
class Row:
    """tokens, labels int64 (seq,), documents int32 (seq,): 0, 1, ... within the row, -1 = padding."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    documents: NDArray[np.int32]


def pack_best_fit(lengths: Sequence[int] | NDArray[np.integer], seq: int) -> list[list[Piece]]:
    """Rows of pieces, each row of at most `seq` tokens; longest pieces first, each into the fullest row that takes it.

    lengths: (documents,) tokens in each document
    """
    rows: list[list[Piece]] = []
    rests: list[Piece] = []
    for document, length in enumerate(np.asarray(lengths).tolist()):
        cut = length - length % seq
        rows.extend([Piece(document, start, start + seq)] for start in range(0, cut, seq))
        if cut < length:
            rests.append(Piece(document, cut, length))
    rests.sort(key=lambda piece: piece.start - piece.stop)
    # rows by the room they have left; bit r of `rooms` says that some row has room r, so that the
    # smallest sufficient room is the lowest set bit at or above the wanted length
    by_room: dict[int, list[int]] = {}
    rooms = 0
    for piece in rests:
        length = piece.stop - piece.start
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = seq, len(rows)
            rows.append([])
        rows[row].append(piece)
        left = room - length
        if left:
            by_room.setdefault(left, []).append(row)
            rooms |= 1 << left
    return rows


class ConcatPacking:
    """Rows of `seq` tokens cut from documents laid end to end in the given order; only the last row may be short."""

    def __init__(self, lengths: NDArray[np.integer], order: NDArray[np.integer], seq: int) -> None:
        """lengths: (all documents,), order: (documents used,) their numbers."""
        self.order = order
        self.seq = seq
        self.ends = np.cumsum(lengths[order], dtype=np.int64)

    def __len__(self) -> int:
        return num_concat_rows(int(self.ends[-1]), self.seq)

    def __getitem__(self, row: int) -> list[Piece]:
        first, last = row * self.seq, min((row + 1) * self.seq, int(self.ends[-1]))
        pieces = []
        index = int(np.searchsorted(self.ends, first, side="right"))
        position = first
        while position < last:
            begin = int(self.ends[index - 1]) if index else 0
            stop = min(int(self.ends[index]), last)
            if stop > position:
                pieces.append(Piece(int(self.order[index]), position - begin, stop - begin))
            position = stop
            index += 1
        return pieces


def num_concat_rows(tokens: int, seq: int) -> int:
    """Rows that `tokens` tokens laid end to end fill, the last perhaps in part."""
    return -(-tokens // seq)


def fill_row(documents: Documents, pieces: Sequence[Piece], seq: int) -> Row:
    """The arrays of one row of pieces."""
    row = Row(
        tokens=np.zeros(seq, np.int64),
        labels=np.full(seq, IGNORE, np.int64),
        documents=np.full(seq, PADDING, np.int32),
    )
    position = 0
    for number, (document, start, stop) in enumerate(pieces):
        ids = documents[document][start : stop + 1]
        length = stop - start
        row.tokens[position : position + length] = ids[:length]
        row.labels[position : position + len(ids) - 1] = ids[1:]
        row.documents[position : position + length] = number
        position += length
    return row
