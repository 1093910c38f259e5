"""Packing keeps every token once, whatever the lengths."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alloy.data.packing import ConcatPacking, Piece, fill_row, pack_best_fit

lengths_lists = st.lists(st.integers(1, 60), max_size=50)
row_lengths = st.integers(1, 23)


def documents_of(lengths: list[int]) -> list[np.ndarray]:
    """Documents whose ids say where they stand: 1000 * document + position."""
    return [1000 * (i + 1) + np.arange(length) for i, length in enumerate(lengths)]


def assert_each_token_once(rows: list[list[Piece]], lengths: list[int], seq: int) -> None:
    seen = sorted((piece.document, i) for row in rows for piece in row for i in range(piece.start, piece.stop))
    assert seen == [(document, i) for document, length in enumerate(lengths) for i in range(length)]
    assert all(0 < sum(piece.stop - piece.start for piece in row) <= seq for row in rows)


@given(lengths_lists, row_lengths)
def test_best_fit_invariants(lengths, seq) -> None:
    """Every token once, no row overflows, only documents longer than a row are cut, and as little as possible."""
    rows = pack_best_fit(lengths, seq)
    assert_each_token_once(rows, lengths, seq)
    for document, length in enumerate(lengths):
        pieces = [piece for row in rows for piece in row if piece.document == document]
        assert len(pieces) == -(-length // seq)


@given(lengths_lists, row_lengths)
def test_best_fit_equals_plain_search(lengths, seq) -> None:
    """The same number of rows, with the same fills, as trying every row for each piece, longest first."""
    pieces = [seq] * sum(length // seq for length in lengths)
    pieces += sorted((length % seq for length in lengths if length % seq), reverse=True)
    fills: list[int] = []
    for piece in pieces:
        fitting = [i for i, fill in enumerate(fills) if fill + piece <= seq]
        if fitting:
            fills[max(fitting, key=lambda i: fills[i])] += piece
        else:
            fills.append(piece)
    rows = pack_best_fit(lengths, seq)
    assert sorted(sum(p.stop - p.start for p in row) for row in rows) == sorted(fills)


@given(lengths_lists.filter(bool), row_lengths, st.randoms(use_true_random=False))
def test_concat_invariants(lengths, seq, random) -> None:
    """Every token once, documents in the given order, all rows but the last full."""
    order = list(range(len(lengths)))
    random.shuffle(order)
    packing = ConcatPacking(np.array(lengths), np.array(order), seq)
    rows = [packing[row] for row in range(len(packing))]
    assert_each_token_once(rows, lengths, seq)
    assert all(sum(piece.stop - piece.start for piece in row) == seq for row in rows[:-1])
    stream = [(piece.document, i) for row in rows for piece in row for i in range(piece.start, piece.stop)]
    assert stream == [(document, i) for document in order for i in range(lengths[document])]


@pytest.mark.parametrize("pack", ["best_fit", "concat"])
@given(lengths=lengths_lists.filter(bool), seq=row_lengths)
def test_labels_are_the_next_token_of_the_document(pack, lengths, seq) -> None:
    """Over all rows each token but a document's first is a label once; labels never cross documents or touch padding."""
    documents = documents_of(lengths)
    rows = (
        ConcatPacking(np.array(lengths), np.arange(len(lengths)), seq)
        if pack == "concat"
        else pack_best_fit(lengths, seq)
    )
    pieces = [rows[row] for row in range(len(rows))]
    filled = [fill_row(documents, row, seq) for row in pieces]
    labels = np.concatenate([row.labels for row in filled])
    assert sorted(labels[labels != -100]) == [i for ids in documents for i in ids[1:]]
    for row in filled:
        real = row.documents >= 0
        assert (row.labels[~real] == -100).all()
        assert (row.tokens[~real] == 0).all()
        known = row.labels != -100
        assert (row.labels[known] == row.tokens[known] + 1).all()
        # padding only at the end; numbers rise by one at each document
        assert (np.diff(real.astype(int)) <= 0).all()
        assert set(np.diff(row.documents[real])) <= {0, 1}
        same = row.documents[1:] == row.documents[:-1]
        assert (row.tokens[1:][same & real[1:]] == row.tokens[:-1][same & real[1:]] + 1).all()


def test_a_row_by_hand() -> None:
    """Two short documents and padding; a cut document's label reaches into its next piece."""
    documents = [np.array([5, 6, 7]), np.array([8]), np.array([1, 2, 3, 4])]
    row = fill_row(documents, [Piece(0, 0, 3), Piece(1, 0, 1)], seq=6)
    assert row.tokens.tolist() == [5, 6, 7, 8, 0, 0]
    assert row.labels.tolist() == [6, 7, -100, -100, -100, -100]
    assert row.documents.tolist() == [0, 0, 0, 1, -1, -1]
    assert fill_row(documents, [Piece(2, 0, 3)], seq=3).labels.tolist() == [2, 3, 4]
