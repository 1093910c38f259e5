"""Text from tokens: whole characters, whole text, and never a piece of a stop string."""

import random
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from alloy.engine.codec import Codec
from alloy.engine.detokenizer import Detokenizer

Spell = Callable[[int], bytes] | None

LETTERS = "abßλ🙂 "


def from_bytes(ids: Sequence[int]) -> str:
    """A tokenizer of single bytes."""
    return bytes(ids).decode("utf-8", errors="replace")


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, int] | None:
    """Independent truth: grow the text character by character until it ends in a stop string; the longest counts."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stops if text[:end].endswith(s)]
        if ending:
            return end - len(max(ending, key=len)), end
    return None


def as_byte(token: int) -> bytes:
    """The same tokenizer, token by token."""
    return bytes([token])


@pytest.mark.parametrize("spell", [None, as_byte])
@given(st.lists(st.integers(0, 255), max_size=40))
def test_any_bytes_stream_to_the_decoded_whole(spell: Spell, ids: list[int]) -> None:
    """Pieces concatenate to the text of all bytes, valid or not."""
    d = Detokenizer(from_bytes, spell=spell)
    assert "".join(d.push(i) for i in ids) + d.finish() == from_bytes(ids)


def test_byte_level_tokens_are_spelled_as_they_are_decoded() -> None:
    """Every byte, tokens of several, added ones with letters outside the vocabulary, unknown ids: as the tokenizer says."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([*letters, "Ġa", "ÃŁ", "ðŁ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [AddedToken("two words"), AddedToken("é"), AddedToken("🙂é"), AddedToken("<|x|>", special=True)]
    )
    codec = Codec(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert codec.spell is not None
    ids = [*range(tokenizer.get_vocab_size() + 2), vocab["ÃŁ"], vocab["ðŁ"]]
    drawn = random.Random(0)
    for _ in range(200):
        drawn.shuffle(ids)
        d = Detokenizer(codec.decode, spell=codec.spell)
        assert "".join(d.push(i) for i in ids) + d.finish() == codec.decode(ids)


def test_other_decoders_are_asked_for_whole_texts() -> None:
    """A decoder that looks at neighbours spells no token by itself."""
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    tokenizer.decoder = decoders.Metaspace()
    assert Codec(PreTrainedTokenizerFast(tokenizer_object=tokenizer)).spell is None


@pytest.mark.parametrize("spell", [None, as_byte])
@given(st.text(max_size=20))
def test_a_whole_character_is_released_with_its_last_byte(spell: Spell, text: str) -> None:
    """Valid text is never delayed beyond the character, and never holds U+FFFD of its own making."""
    d, seen = Detokenizer(from_bytes, spell=spell), ""
    for character in text:
        pieces = [d.push(b) for b in character.encode()]
        if character != "\ufffd":
            assert "".join(pieces[:-1]).strip("\ufffd") == ""
        seen += "".join(pieces)
    assert seen + d.finish() == text


@pytest.mark.parametrize("spell", [None, as_byte])
def test_an_incomplete_character_becomes_one_replacement_at_the_end(spell: Spell) -> None:
    """Three of four bytes: nothing while streaming, U+FFFD once at the end."""
    d = Detokenizer(from_bytes, spell=spell)
    assert [d.push(b) for b in "🙂".encode()[:3]] == ["", "", ""]
    assert d.finish() == "\ufffd"
    assert d.finish() == ""


@settings(max_examples=300)
@given(
    st.text(LETTERS, max_size=25),
    st.lists(st.text(LETTERS, min_size=1, max_size=4), min_size=1, max_size=3),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_stop_strings_are_found_wherever_tokens_cut_them(
    text: str, stops: list[str], include: bool, is_spelled: bool, data: st.DataObject
) -> None:
    """Random cuts of the bytes: the streamed text ends where the first complete stop string says, to the character."""
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)), max_size=12)) | {0, len(raw)})
    table = [raw[a:b] for a, b in pairwise(cuts)]

    def decode(ids: Sequence[int]) -> str:
        return b"".join(table[i] for i in ids).decode("utf-8", errors="replace")

    spell = table.__getitem__ if is_spelled else None
    d, out = Detokenizer(decode, stop=stops, include_stop=include, spell=spell), ""
    for i in range(len(table)):
        out += d.push(i)
        if d.stopped_by is not None:
            break
        assert not any(s in out for s in stops)
    out += d.finish()
    found = first_stop(text, stops)
    if found is None:
        assert d.stopped_by is None
        assert out == text
    else:
        assert d.stopped_by == text[found[0] : found[1]]
        assert out == text[: found[1] if include else found[0]]


def test_text_that_may_begin_a_stop_string_is_held_then_released() -> None:
    """The longest possible beginning is held; when it turns out harmless it comes out at once."""
    d = Detokenizer(from_bytes, stop=["<end>", "en"])
    assert [d.push(b) for b in b"a<e"] == ["a", "", ""]
    assert d.push(ord("x")) == "<ex"
    assert [d.push(b) for b in b"<e"] == ["", ""]
    assert d.finish() == "<e"


def test_a_stop_string_completed_before_stopping_is_allowed_stays_text() -> None:
    """min_tokens: what was complete earlier does not end the answer later."""
    d = Detokenizer(from_bytes, stop=["ab", "abc"])
    out = d.push(ord("a"), may_stop=False) + d.push(ord("b"), may_stop=False) + d.push(ord("x"))
    assert (out, d.stopped_by) == ("abx", None)
    assert d.push(ord("a")) + d.push(ord("b")) == ""
    assert d.stopped_by == "ab"


def test_skipped_ids_have_no_text() -> None:
    """Special tokens leave no trace, even in the middle of a character."""
    d, raw = Detokenizer(from_bytes, skip={0}), "ß".encode()
    assert d.push(raw[0]) + d.push(0) + d.push(raw[1]) == "ß"


@pytest.mark.parametrize("ids", [[2, 3, 4, 5, 6, 2], [3, 2, 4, 7, 2, 5], [5, 6, 5]])
def test_sentencepiece_style_spaces_and_byte_fallback(ids: list[int]) -> None:
    """Decoders that strip the first space and glue byte tokens stream to the same text as one call."""
    vocab = {"<unk>": 0, "x": 1, "▁hi": 2, "▁": 3, "<0xE2>": 4, "<0x82>": 5, "<0xAC>": 6, "y": 7}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    d = Detokenizer(tokenizer.decode)
    assert "".join(d.push(i) for i in ids) + d.finish() == tokenizer.decode(ids)
