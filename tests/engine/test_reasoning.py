"""Thoughts whose markers are several tokens: where they end, how long they are, and what a budget and a grammar make of it."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from alloy.engine.codec import Codec
from alloy.engine.core import LLM
from alloy.engine.grammar import Grammar, compile_grammar
from alloy.engine.reasoning import ThinkingBudget, ThinkingMarkers, Thought
from alloy.engine.request import SamplingParams
from alloy.errors import CheckpointError, RequestError
from alloy.serve.reasoning import Split
from tests.engine.conftest import VOCAB, byte_tokenizer
from tests.engine.test_prefix import small

START, END = "<think>", "</think>"
# byte-level characters: Ċ is the newline
MERGES = [("<", "/"), (">", "Ċ"), (">", "{"), (".", "</"), (">", "<"), ("><", "/")]
TURNS = ("</s>", "<|im_start|>", "<|im_end|>")
CHAT = [{"role": "user", "content": "hi"}]
# tokens of a vocabulary that spells its markers in many ways; " " may stand before an answer
PIECES = ["a", "\n", "<", "/", "</", "think", "th", "ink", ">", ">\n", "ink>", ".</", ">b", "><", "</th", "x</think>y"]
PIECES += [" ", "<think", "<think>"]
STREAMS = st.lists(st.integers(0, len(PIECES) - 1), max_size=24)
# streams that nearly, or really, close a thought
NEAR = st.lists(
    st.sampled_from([[PIECES.index(p) for p in word] for word in
                     (["</", "think", ">"], ["<", "/", "th"], ["</"], [".</", "think"], ["a"], ["\n"], ["</th", "ink>"])]),
    max_size=7,
).map(lambda words: [token for word in words for token in word])  # fmt: skip


def spell(text: str) -> list[int]:
    """Ids of a text, character by character where no longer piece is."""
    ids: list[int] = []
    while text:
        piece = max((p for p in PIECES if p and text.startswith(p)), key=len)
        ids.append(PIECES.index(piece))
        text = text[len(piece) :]
    return ids


# a marker's own letters, so that each of its ends can be spelled
PIECES += ["t", "h", "i", "n", "k"]
MARKERS = ThinkingMarkers(START, END, (), frozenset(), PIECES.__getitem__, spell)


def count(tokens: list[int]) -> tuple[bool, int]:
    """Whether a thought that was open before `tokens` still is, and its length: tokens that begin before the end marker."""
    text = "".join(PIECES[t] for t in tokens)
    at = text.find(END)
    begins = [len("".join(PIECES[t] for t in tokens[:i])) for i in range(len(tokens))]
    return (True, len(tokens)) if at < 0 else (False, sum(begin < at for begin in begins))


def partly(text: str) -> int:
    """How much of the end marker stands at the end of a text, short of all of it."""
    return max(size for size in range(len(END)) if text.endswith(END[:size]))


@given(STREAMS | NEAR)
@example(spell("a</think>\n<think>a"))
def test_a_thought_ends_where_its_text_does(tokens: list[int]) -> None:
    """After every token: open, length and what is held are those of the whole text; the split of the text agrees."""
    thought, split = Thought(MARKERS, inside=True), Split((START, END), is_inside=True)
    parts = {"thought": "", "answer": ""}
    for i, token in enumerate(tokens):
        thought.push(token)
        inside, used = count(tokens[: i + 1])
        assert (thought.inside, thought.used) == (inside, used)
        text = "".join(PIECES[t] for t in tokens[: i + 1])
        assert thought.held == (text[len(text) - partly(text) :] if inside else "") or not inside
        for kind, piece in split.push(PIECES[token]):
            parts[kind] += piece
    for kind, piece in split.finish():
        parts[kind] += piece
    text = "".join(PIECES[t] for t in tokens)
    assert parts["thought"] == text.partition(END)[0].strip("\n")
    assert thought.inside == (END not in text)


@given(STREAMS, STREAMS | NEAR)
def test_a_thought_opens_an_answer_or_is_text(before: list[int], after: list[int]) -> None:
    """Without a thought in the prompt: only blanks may stand before the start marker; later markers change nothing."""
    for tokens in (before, [*before, *spell(START), *after]):
        thought = Thought(MARKERS)
        for token in tokens:
            thought.push(token)
        text = "".join(PIECES[t] for t in tokens).lstrip()
        is_thought = text.startswith(START)
        assert thought.inside == (is_thought and END not in text)
        assert is_thought or not thought.used


@given(STREAMS, STREAMS | NEAR)
def test_a_prompt_is_read_as_if_it_had_been_generated(before: list[int], after: list[int]) -> None:
    """Whatever a prompt held before the last start marker, a thought that is open at its end has just its tokens."""
    text = "".join(PIECES[t] for t in [*before, *spell(START), *after])
    prompt = [*before, *spell(START), *after]
    thought = Thought(MARKERS, prompt)
    assert thought.inside == (text.rfind(START) > text.rfind(END))
    if thought.inside and START not in "".join(PIECES[t] for t in after):
        assert (True, thought.used) == count(after)
    if thought.inside:
        assert thought.held == text[len(text) - partly(text[text.rfind(START) + len(START) :]) :]


@given(NEAR | STREAMS, st.integers(0, 12), st.integers(0, 8), st.booleans())
def test_a_budget_is_hard_whatever_the_tokens(tokens: list[int], budget: int, grace: int, has_text: bool) -> None:
    """At the limit, or at a newline within `grace` of it, the marker is completed if a part of it stands there, else written after the closing text; never a token
    of thought over the budget, and nothing is forced before it or after the thought."""
    text = spell("a\n") if has_text else []
    counter = ThinkingBudget(budget, grace, text, MARKERS, lambda token: "\n" in PIECES[token])
    made: list[int] = []
    forced = list(counter.start([*spell(START)]))
    chosen = iter(tokens)
    at, said = None, ""
    while True:
        lands = len(made) > budget - grace and made and "\n" in PIECES[made[-1]]
        if at is None and count(made)[0] and (len(made) == budget or lands):
            at = len(made)
            said = "".join(PIECES[t] for t in made)
            expected = spell(END[partly(said) :]) if partly(said) else [*text, *spell(END)]
            assert forced == expected
            assert len(made) <= budget
        assert not (at is None and forced)
        token = forced[0] if forced else next(chosen, None)
        if token is None:
            break
        more = counter.observe(token, bool(forced))
        assert not (forced and more)
        forced = forced[1:] or list(more)
        made.append(token)
        assert counter.thought.used <= budget
    # the closing text is no thought
    thought = made if at is None else [*made[:at], *spell(END[partly(said) :])]
    assert (counter.thought.inside, counter.thought.used) == count(thought)
    assert at is None or not counter.thought.inside


def test_a_token_without_text_ends_no_marker(spelled) -> None:
    """Special tokens have no text: what stands around them is one text, as it is for who reads it."""
    codec = Codec(spelled)
    assert codec.markers is not None
    thought = Thought(codec.markers, inside=True)
    for token in [*b"ab</th", 257, *b"ink>c"]:
        thought.push(token)
    assert (thought.inside, thought.used) == (False, 2)


@pytest.fixture(scope="module")
def spelled() -> PreTrainedTokenizerFast:
    """Single bytes; the markers are text alone."""
    return byte_tokenizer(TURNS)


def test_markers_are_found(spelled) -> None:
    """Single tokens by id; else what generation_config.json names, as text or ids; else what the template writes."""
    single = Codec(byte_tokenizer()).markers
    assert single is not None
    assert (single.ids, single.start, single.end) == ((259, 260), START, END)
    assert [single.piece(i) for i in (65, 259, 260)] == ["", START, END]
    several = Codec(spelled).markers
    assert several is not None
    assert (several.ids, several.start, several.end) == ((), START, END)
    named = [
        {"start": "\n[in]\n", "end": "[out]"},
        {"start": spelled.encode("\n[in]\n"), "end": [spelled.encode("[out]\n"), spelled.encode("[out]")]},
    ]
    for reasoning in named:
        found = Codec(spelled, reasoning).markers
        assert found is not None
        assert (found.start, found.end) == ("[in]", "[out]")
    plain = byte_tokenizer(TURNS)
    plain.chat_template = "{{ messages[0].content }}"
    assert Codec(plain).markers is None
    special = byte_tokenizer((*TURNS, "<|in|>", "<|out|>"))
    codec = Codec(special, {"start": "<|in|>", "end": "<|out|>"})
    assert codec.markers is not None
    assert codec.markers.ids == (259, 260)
    # the split needs their text
    assert codec.skipped == {256, 257, 258}
    for wrong in ({"start": "a"}, {"start": "a", "end": 3}, {"start": " ", "end": "b"}, {"start": "a", "end": [["x"]]}):
        with pytest.raises(
            CheckpointError, match=r"generation_config\.json: reasoning\.\w+ must be the text or the ids"
        ):
            Codec(spelled, wrong)


def test_prompts_of_a_template(spelled) -> None:
    """Tokens may join markers with each other and with the text around them; what a user writes opens nothing."""
    for tokenizer in (spelled, byte_tokenizer(TURNS, MERGES), byte_tokenizer()):
        markers = Codec(tokenizer).markers
        assert markers is not None
        for text, inside, used in (
            ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>", True, 0),
            ("assistant\n<think>ab.", True, 3),
            ("assistant\n<think></think>", False, 0),
            ("x<think>abc</think>d", False, 0),
            ("x<think>abc</think>d<think>ef", True, 2),
            ("<think>never closed<|im_end|>\n<|im_start|>assistant\n<think>g", True, 1),
            ("what is <think>?<|im_end|>\n<|im_start|>assistant\n", False, 0),
            ("plain", False, 0),
        ):
            thought = Thought(markers, tokenizer.encode(text))
            assert (thought.inside, thought.used) == (inside, used), text
    half = Thought(Codec(spelled).markers, spelled.encode("<think>ab</th"))
    assert (half.inside, half.used, half.held) == (True, 6, "</th")


def test_a_decoder_that_takes_the_first_space_away() -> None:
    """A space before "/think>" is text; the rest of a marker that cannot be written without one is not forced."""
    letters = ["<unk>", "▁", *"</think>a", "▁/"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(letters))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "/")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<unk>")
    tokenizer.chat_template = START
    markers = Codec(tokenizer).markers
    assert markers is not None
    thought = Thought(markers, inside=True)
    for piece in ("<", "▁/", *"think>"):
        thought.push(vocab[piece])
    assert thought.inside
    assert tokenizer.decode([vocab[p] for p in ("a", "<", "▁/")]) == "a< /"
    counter = ThinkingBudget(2, 0, (), markers, lambda token: False)
    counter.thought = Thought(markers, inside=True)
    assert counter.observe(vocab["a"], False) == ()
    forced = counter.observe(vocab["<"], False)
    assert tokenizer.decode([vocab["a"], vocab["<"], *forced]) == "a< </think>"
    for token in forced:
        counter.observe(token, True)
    assert (counter.thought.inside, counter.thought.used) == (False, 2)


def expect(free: list[int], budget: int, grace: int, closing: list[int]) -> tuple[list[int], int, str]:
    """The rule in plain Python, for single bytes after a prompt whose thought holds one newline: what must be generated up to
    the end of the thought, its tokens, and what was pending at the limit; `free` is what comes without a budget."""
    made: list[int] = []
    if budget > 1:
        for token in free:
            made.append(token)
            text = bytes(made).decode("latin-1")
            if text.endswith(END):
                return made, 1 + len(made) - len(END), ""
            if 1 + len(made) == budget or (1 + len(made) > budget - grace and token == ord("\n")):
                break
    pending = partly(bytes(made).decode("latin-1"))
    forced = list(END[pending:].encode()) if pending else [*closing, *END.encode()]
    return made + forced, 1 + len(made) - pending, END[:pending]


# bytes of the marker come often, the ends of a turn never
PUSHED = {
    **{ord(c): 4.0 for c in "</think>"},
    ord("\n"): 3.0,
    ord("<"): 6.0,
    ord("/"): 6.0,
    256: -100,
    257: -100,
    258: -100,
}


@pytest.mark.parametrize("speculate", [0, 3])
def test_a_budget_with_markers_of_bytes_is_exact(mtp_model, spelled, speculate: int) -> None:
    """Budgets and soft landings are those of the plain rule on what comes without a budget; also where the limit, or the
    newline, cuts a marker that the model began, and where max_tokens cuts the closing."""
    llm, plain = LLM(mtp_model, spelled, speculate=speculate), LLM(mtp_model, spelled, speculate=0)
    cut: set[str] = set()
    for seed in range(10):
        free = SamplingParams(seed=seed, max_tokens=30, logit_bias=PUSHED)
        tokens = plain.chat(CHAT, free)[0].completions[0].token_ids
        for budget, grace in ((0, 0), (2, 0), (5, 0), (8, 0), (12, 9)):
            params = replace(free, thinking_budget=budget, thinking_grace=grace, thinking_close_text="ok.")
            want, used, pending = expect(tokens, budget, grace, spelled.encode("ok."))
            answer = llm.chat(CHAT, params)[0].completions[0]
            assert answer.token_ids[: len(want)] == want
            assert answer.reasoning_tokens == used <= max(1, budget)
            assert len(answer.token_ids) == 30
            cut.add(pending)
            short = llm.chat(CHAT, replace(params, max_tokens=len(want) - 2))[0].completions[0]
            assert (short.token_ids, short.finish_reason) == (want[:-2], "length")
    assert len(cut) > 2


def test_drafts_preemption_and_neighbours_change_no_thought(mtp_model, spelled) -> None:
    """Three long answers in a cache for one and a half, with and without drafts, are those of each alone."""
    params = [
        SamplingParams(
            seed=i, max_tokens=90, thinking_budget=40 + i, thinking_close_text="so", ignore_eos=True, logit_bias=PUSHED
        )
        for i in range(3)
    ]
    prompts = [spelled.encode(f"{i} question <think>") for i in range(3)]
    alone = [LLM(mtp_model, spelled, speculate=0).generate([p], s)[0] for p, s in zip(prompts, params, strict=True)]
    for speculate in (0, 3):
        llm = small(mtp_model, slots=4, blocks=4, max_seqs=3, tokenizer=spelled, speculate=speculate)
        outs = llm.generate(prompts, params)
        assert llm.stats.preemptions > 0
        for out, want in zip(outs, alone, strict=True):
            got = out.completions[0]
            assert got.token_ids == want.completions[0].token_ids
            assert got.reasoning_tokens == want.completions[0].reasoning_tokens
            assert END in got.text


@pytest.mark.parametrize("speculate", [0, 3])
def test_a_grammar_begins_after_markers_of_bytes(mtp_model, spelled, speculate: int) -> None:
    """The thought is free and closed by its budget; JSON after it, though the model would rather write anything else."""
    llm = LLM(mtp_model, spelled, speculate=speculate)
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"enum": ["x", "</think>"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    bias = {ord("<"): 5.0, ord("/"): 5.0, 256: 60.0}
    params = SamplingParams(
        max_tokens=140, thinking_budget=9, grammar=Grammar("json_schema", json.dumps(schema)), logit_bias=bias
    )
    for seed in range(6):
        answer = llm.generate(["what <think>"], replace(params, seed=seed))[0].completions[0]
        # no text holds a byte of 255
        made = bytes(min(token, 255) for token in answer.token_ids)
        assert answer.reasoning_tokens == made.find(END.encode()) <= 9
        rest = answer.text.partition(END)[2]
        if answer.finish_reason == "stop":
            assert set(json.loads(rest)) == {"a", "b"}
    cut = llm.generate(["<think>"], replace(params, thinking_budget=None, max_tokens=5, logit_bias={256: 100.0}))[0]
    assert (cut.completions[0].finish_reason, len(cut.completions[0].token_ids)) == ("length", 5)


def test_masks_around_markers_by_hand() -> None:
    """Inside a thought all but the ends, and but tokens that would close it and begin the answer; over drafts the same as
    step by step."""
    tokenizer = byte_tokenizer(TURNS, MERGES)
    vocab = len(tokenizer)
    known = tokenizer.get_vocab()
    eos = known["</s>"]
    compiled = compile_grammar(Grammar("regex", r"\{a"), Codec(tokenizer), vocab)

    def start():
        return compiled.start(tokenizer.encode("<think>"), frozenset([eos]))

    def allowed(rows: np.ndarray) -> set[int]:
        return set(np.flatnonzero(np.unpackbits(rows.view(np.uint8), bitorder="little"))) & set(range(vocab))

    tokens = [known[p] for p in ("a", "</", *"think", ">Ċ", "{", "a")]
    everything = set(range(vocab)) - {eos}
    want = [everything] * 6 + [set(), everything, {known["{"]}, {known["a"]}, {eos}]
    # after "</think" a token may be the end of the marker, alone or with a newline, or more of the thought
    want[6:8] = [everything, everything - {known[p] for p in (">{", "><", "></")}]
    state, single = start(), np.zeros((1, compiled.words), np.uint32)
    drafted = np.zeros((len(tokens) + 1, compiled.words), np.uint32)
    state.masks(drafted, tokens)
    for j in range(len(tokens) + 1):
        state.masks(single)
        assert allowed(single) == want[j], j
        assert j == len(tokens) or allowed(drafted[j]) == want[j], j
        if j < len(tokens):
            assert not state.may_stop
            assert state.advance(tokens[j])
    assert state.may_stop


def test_a_model_without_markers_has_no_budget(mtp_model) -> None:
    plain = byte_tokenizer(TURNS)
    plain.chat_template = "{{ messages[0].content }}"
    with pytest.raises(
        RequestError, match="no single tokens <think> and </think> and its chat template does not write"
    ):
        LLM(mtp_model, plain).generate("a", SamplingParams(thinking_budget=3))
    assert len(plain) <= VOCAB
