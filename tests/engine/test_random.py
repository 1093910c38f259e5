"""Philox against the published test vectors, and the properties that sampling relies on."""

import numpy as np

from alloy.engine.random import philox, uniforms


def test_known_answers_of_random123() -> None:
    """The three vectors for philox4x32-10 in the authors' kat_vectors file."""
    ones = 0xFFFFFFFF
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    cases = [
        ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([ones] * 4, (ones, ones), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (pi, (0xA4093822, 0x299F31D0), "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ]
    for counter, key, want in cases:
        got = philox(np.array(counter, dtype=np.uint64)[:, None], key)[:, 0]
        assert " ".join(f"{int(w):08x}" for w in got) == want


def test_numbers_are_a_function_of_seed_stream_and_position() -> None:
    """Any block gives the same number for a position; other seeds and streams give others; all inside (0, 1)."""
    whole = uniforms(-5, 0, 0, 130)
    assert uniforms(-5, 0, 64, 17) == whole[64:81]
    assert len(set(whole) | set(uniforms(6, 0, 0, 130)) | set(uniforms(-5, 1, 0, 130))) == 390
    assert all(0 < u < 1 for u in whole)
    assert abs(float(np.mean(uniforms(2**64 - 1, 3, 0, 20_000))) - 0.5) < 0.01
