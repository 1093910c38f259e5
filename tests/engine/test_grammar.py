"""Answers under a grammar: whatever the weights, the sampling and the drafts, a text that ended meets it."""

import json
import re
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
import torch

from alloy.engine import grammar as grammars
from alloy.engine.codec import Codec
from alloy.engine.core import LLM
from alloy.engine.grammar import Grammar, compile_grammar
from alloy.engine.request import SamplingParams
from alloy.errors import RequestError
from alloy.ops.sampling import apply_bitmask

VOCAB, EOS, THINK, CLOSE = 261, 256, 259, 260
QUOTE = ord('"')
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["red", "grün", None, 3]}, "minItems": 1, "maxItems": 3},
        "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,3}$"},
    },
    "required": ["name", "age", "tags", "code"],
    "additionalProperties": False,
}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {
                    "anyOf": [{"type": "boolean"}, {"type": "number", "minimum": -3, "maximum": 3}, {"const": "x"}]
                },
                "left": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["value", "left"],
            "additionalProperties": False,
        }
    },
}
SCHEMAS = {
    "person": PERSON,
    "tree": TREE,
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "string", "format": "date"}, {"type": "integer", "multipleOf": 7}],
        "items": False,
        "minItems": 2,
    },
    "both": {
        "allOf": [{"properties": {"a": {"type": "integer"}}}, {"required": ["a"]}],
        "type": "object",
        "maxProperties": 1,
    },
}


def schema_grammar(schema: object) -> Grammar:
    return Grammar("json_schema", json.dumps(schema))


def check(schema: object, text: str) -> None:
    jsonschema.validate(json.loads(text), schema)


def completes(grammar: Grammar, text: str, tokenizer) -> bool:
    """Whether `text` is a beginning of some text of the grammar."""
    state = compile_grammar(grammar, Codec(tokenizer), VOCAB).start([1], frozenset([EOS]))
    return all(state.advance(byte) for byte in text.encode())


@pytest.mark.parametrize("name", SCHEMAS)
def test_answers_that_ended_are_valid_json_of_the_schema(model, tokenizer, name) -> None:
    """Random weights, twelve seeds, hot and with penalties, in one batch: each ended answer parses and validates, each cut
    one is a beginning of an answer; some do end."""
    schema = SCHEMAS[name]
    rules = schema_grammar(schema)
    params = [
        SamplingParams(
            grammar=rules,
            seed=seed,
            max_tokens=150,
            temperature=(0.3, 1.0, 5.0)[seed % 3],
            top_p=0.95,
            frequency_penalty=0.4,
            presence_penalty=-0.3,
            repetition_penalty=1.2,
            logit_bias={QUOTE: 6, ord("}"): 5},
        )
        for seed in range(12)
    ]
    outputs = LLM(model, tokenizer).generate([[5, 6, 7]] * 12, params)
    ended = 0
    for output in outputs:
        answer = output.completions[0]
        if answer.finish_reason == "stop":
            ended += 1
            check(schema, answer.text)
        else:
            assert answer.finish_reason == "length"
            assert completes(rules, answer.text, tokenizer)
    assert ended > 4


def random_schema(r: np.random.Generator, depth: int = 0) -> dict[str, object]:
    """A small schema of any shape, closed objects and short strings so that answers end."""
    kinds = ["integer", "number", "string", "boolean", "null", "enum", "pattern"] + ["object", "array", "anyOf"] * (
        depth < 3
    )
    kind = str(r.choice(kinds))
    if kind == "object":
        names = [f"k{i}" for i in range(int(r.integers(0, 4)))]
        return {
            "type": "object",
            "properties": {name: random_schema(r, depth + 1) for name in names},
            "required": [name for name in names if r.random() < 0.6],
            "additionalProperties": False,
        }
    if kind == "array":
        low = int(r.integers(0, 3))
        return {"type": "array", "items": random_schema(r, depth + 1), "minItems": low, "maxItems": low + 1}
    return {
        "anyOf": lambda: {"anyOf": [random_schema(r, depth + 1) for _ in range(int(r.integers(1, 4)))]},
        "enum": lambda: {"enum": ['a"b', "é", 7, -0.5, True, None][int(r.integers(0, 5)) :]},
        "pattern": lambda: {
            "type": "string",
            "pattern": ["^(ab|cd)*x$", "^[0-9]{3}$", "^[^a-z]{1,2}$"][int(r.integers(0, 3))],
        },
        "string": lambda: {"type": "string", "minLength": int(r.integers(0, 3)), "maxLength": 4},
        "integer": lambda: {"type": "integer", "minimum": -int(r.integers(0, 99)), "exclusiveMaximum": 1000},
        "number": lambda: {"type": "number", "minimum": -1, "maximum": 12.5},
    }.get(kind, lambda: {"type": kind})()


def test_random_schemas_hold(build_model, tokenizer) -> None:
    """Sixty random schemas at once, each with its own grammar, drafts on: what ended validates, and most do end."""
    r = np.random.default_rng(7)
    schemas = [random_schema(r) for _ in range(60)]
    params = [
        SamplingParams(grammar=schema_grammar(s), seed=i, max_tokens=140, temperature=1.5, logit_bias={QUOTE: 4})
        for i, s in enumerate(schemas)
    ]
    llm = LLM(build_model("mtp", seed=1), tokenizer, max_seqs=20, speculate=2)
    outputs = llm.generate([[3, 4]] * 60, params)
    ended = 0
    for schema, output in zip(schemas, outputs, strict=True):
        answer = output.completions[0]
        assert answer.finish_reason in ("stop", "length")
        if answer.finish_reason == "stop":
            ended += 1
            check(schema, answer.text)
    assert ended > 40


@pytest.mark.parametrize(
    "expression", ["[ab]{2,5}c", "(?:yes|no)!?", "[0-9]+(?:\\.[0-9]{1,2})?", "[^x\\n]{3}", "^a.{2}z$", "grün|blau|😀+"]
)
def test_answers_match_the_expression(model, tokenizer, expression) -> None:
    """The whole text, by Python's own `re`."""
    params = [
        SamplingParams(grammar=Grammar("regex", expression), seed=s, max_tokens=30, temperature=2.0) for s in range(8)
    ]
    for output in LLM(model, tokenizer).generate([[9]] * 8, params):
        answer = output.completions[0]
        if answer.finish_reason == "stop":
            assert re.fullmatch(expression, answer.text)
        else:
            assert len(answer.token_ids) == 30


def test_choices_objects_and_lark(model, tokenizer) -> None:
    """A choice is one of its texts, also where one begins another; an object is an object; Lark rules hold."""
    texts = ["yes", "yes, sir", 'q"uote\n', "né\\"]
    llm = LLM(model, tokenizer)
    hot = SamplingParams(temperature=3.0, max_tokens=40, n=6, seed=2)
    choice = llm.generate([1, 2], replace(hot, grammar=Grammar("choice", json.dumps(texts))))[0]
    assert all(c.finish_reason == "stop" and c.text in texts for c in choice.completions)
    assert len({c.text for c in choice.completions}) > 1
    lark = llm.generate([1, 2], replace(hot, grammar=Grammar("lark", 'start: sum ";"\nsum: /[0-9]/ ("+" sum)?')))[0]
    ended = [c for c in lark.completions if c.finish_reason == "stop"]
    assert ended
    assert all(re.fullmatch(r"[0-9](\+[0-9])*;", c.text) for c in ended)
    closing = replace(hot, logit_bias={ord("}"): 100}, grammar=Grammar("json_object"))
    assert [c.text for c in llm.generate([1, 2], closing)[0].completions] == ["{}"] * 6


@pytest.fixture(scope="module")
def taught(build_model):
    """A model with drafts that learned to repeat a list of numbers."""
    model = build_model("mtp", seed=2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    text = torch.tensor(list(b"1,22,333," * 9))
    for step in range(60):
        rows = torch.stack([text[(step + 3 * i) % 9 :][:29] for i in range(4)])
        out = model(rows, return_mtp=2)
        loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
        for k, logits in enumerate(out.mtp_logits, 1):
            loss = loss + torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, k + 1 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0, max_tokens=60),
        SamplingParams(temperature=0.8, seed=3, max_tokens=60),
        SamplingParams(temperature=0, frequency_penalty=0.2, min_tokens=7, max_tokens=60),
        SamplingParams(temperature=0, max_tokens=11),
    ],
    ids=["greedy", "sampled", "penalties", "cut"],
)
def test_answers_are_the_same_with_drafts_alone_and_in_a_batch(taught, tokenizer, params) -> None:
    """Accepted drafts, drafts that the grammar forbids, and ends inside a run of drafts change nothing."""
    rules = [
        {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 500}, "minItems": 5, "maxItems": 7},
        {"type": "array", "items": {"type": "integer", "minimum": -9, "maximum": 30}, "minItems": 2, "maxItems": 9},
        {"type": "array", "items": {"anyOf": [{"enum": [1, 22, 333, 4]}, {"type": "null"}]}, "maxItems": 4},
    ]
    asked = [list(b"22,333,1,22,333,"), list(b"1,22,333,1,"), list(b"333,")]
    each = [replace(params, grammar=schema_grammar(s)) for s in rules]
    # a free neighbour must not be masked
    free = replace(params, max_tokens=20)

    def answers(speculate: int, together: bool) -> list[tuple[list[int], str, str | None]]:
        llm = LLM(taught, tokenizer, speculate=speculate)
        if together:
            outputs = llm.generate([*asked, asked[0]], [*each, free])
        else:
            outputs = [llm.generate([a], [p])[0] for a, p in zip([*asked, asked[0]], [*each, free], strict=True)]
        drafted = sum(o.completions[0].accepted for o in outputs[:3])
        assert drafted > 5 or not speculate
        return [(o.completions[0].token_ids, o.text, o.completions[0].finish_reason) for o in outputs]

    plain = answers(0, together=True)
    assert plain == answers(0, together=False) == answers(3, together=True) == answers(5, together=False)
    for schema, (_, text, reason) in zip(rules, plain[:3], strict=True):
        if reason == "stop":
            check(schema, text)
    if params.max_tokens == 60:
        assert [reason for _, _, reason in plain[:3]] == ["stop"] * 3


def test_masks_over_drafts_are_those_of_single_steps(tokenizer) -> None:
    """At each draft position the mask of a state that took the drafts before; the state itself does not move; after a draft
    that cannot be, everything is allowed."""
    compiled = compile_grammar(schema_grammar(PERSON), Codec(tokenizer), VOCAB)
    text = list(b'{"name":"ab","age":12,"tags":["red"],"code":"AB-1"}')
    state = compiled.start([1], frozenset([EOS]))

    def mask(of) -> np.ndarray:
        row = np.zeros((1, compiled.words), np.uint32)
        of.masks(row)
        return row[0]

    for start in range(0, len(text), 7):
        singles = compiled.start([1], frozenset([EOS]), text[:start])
        assert (mask(singles) == mask(state)).all()
        run = text[start : start + 7]
        out = np.zeros((len(run) + 1, compiled.words), np.uint32)
        state.masks(out, run)
        for j, token in enumerate(run):
            assert (out[j] == mask(singles)).all(), (start, j)
            assert singles.advance(token)
        wrong = np.zeros((4, compiled.words), np.uint32)
        state.masks(wrong, [run[0], THINK, run[0]])
        assert (wrong[:2] == out[:2]).all()
        assert (wrong[2:] == 0xFFFFFFFF).all()
        assert not state.advance(THINK)
        assert all(state.advance(token) for token in run)
    assert state.done
    assert state.may_stop


def test_the_grammar_begins_after_the_thought(model, tokenizer) -> None:
    """A thought that the prompt opened is free, even of quotes, and cannot end the answer; after its marker the mask holds,
    also when a budget closes it; a thought cannot be opened anew."""
    llm = LLM(model, tokenizer, speculate="auto" if model.has_mtp else 0)
    rules = Grammar("regex", "[01]{4}")
    params = SamplingParams(
        grammar=rules, seed=1, max_tokens=60, thinking_budget=9, temperature=2.0, logit_bias={EOS: 60, THINK: 90}
    )
    for answer in [c for n in (1, 3) for c in llm.generate([THINK, 5], replace(params, n=n, seed=n))[0].completions]:
        at = answer.token_ids.index(CLOSE)
        assert at <= 9
        assert EOS not in answer.token_ids
        assert re.fullmatch("[01]{4}", bytes(answer.token_ids[at + 1 :]).decode())
        assert answer.finish_reason == "stop"
    closed = llm.generate([THINK, 5, CLOSE, 7], params)[0].completions[0]
    assert re.fullmatch("[01]{4}", closed.text)
    cut = llm.generate([THINK, 5], replace(params, thinking_budget=None, max_tokens=7, logit_bias={CLOSE: -100}))[0]
    assert cut.completions[0].finish_reason == "length"


def test_masks_by_hand(tokenizer) -> None:
    """Inside a thought all but the ends; after it what the expression allows, and the ends where the text may end; never a
    stop token, a marker, or the id that stands for the end, though the expression allows their text."""
    compiled = compile_grammar(Grammar("regex", "a.*"), Codec(tokenizer), VOCAB + 9)
    stop = ord("b")
    state = compiled.start([THINK, 5], frozenset([EOS, stop]))

    def allowed() -> set[int]:
        row = np.zeros((1, compiled.words), np.uint32)
        state.masks(row)
        return set(np.flatnonzero(np.unpackbits(row[0].view(np.uint8), bitorder="little"))) & set(range(VOCAB + 9))

    assert allowed() == set(range(VOCAB + 9)) - {EOS, stop}
    assert state.advance(CLOSE)
    assert allowed() == {ord("a")}
    assert state.advance(ord("a"))
    assert {EOS, stop, ord("c")} <= allowed()
    assert not allowed() & {THINK, CLOSE, *range(VOCAB, VOCAB + 9)}
    state = compiled.start([5], frozenset([EOS]), [ord("a")])
    plain = allowed()
    state = compile_grammar(Grammar("regex", "[ab]{3}"), Codec(tokenizer), VOCAB).start([5], frozenset([EOS, stop]))
    assert stop in plain
    assert allowed() == {ord("a")}


def test_a_mask_beats_every_other_rule(model, tokenizer) -> None:
    """A forbidden token with a bias of 100 does not come; where min_tokens bans the end, the longest answer is the end; a
    stop token ends only what is whole; without any end the last text ends by itself."""
    llm = LLM(model, tokenizer, speculate=0)
    rules = Grammar("regex", "ab?c?")
    greedy = SamplingParams(temperature=0, max_tokens=20, grammar=rules)
    pushed = llm.generate([1], replace(greedy, logit_bias={ord("z"): 100, EOS: 100}))[0].completions[0]
    assert (pushed.text, pushed.token_ids, pushed.finish_reason) == ("a", [ord("a"), EOS], "stop")
    assert pushed.stop_reason is None
    late = llm.generate([1], replace(greedy, logit_bias={EOS: 100, ord("c"): 50}, min_tokens=10))[0].completions[0]
    assert (late.text, late.finish_reason) == ("ac", "stop")
    stopped = llm.generate([1], replace(greedy, logit_bias={ord("z"): 100}, stop_token_ids=[ord("z")]))[0].completions[
        0
    ]
    assert (stopped.token_ids, stopped.stop_reason) == ([ord("a"), ord("z")], ord("z"))
    endless = llm.generate([1], replace(greedy, logit_bias={EOS: 100}, ignore_eos=True))[0].completions[0]
    assert endless.text in ("ab", "ac", "abc") or endless.finish_reason == "length"
    assert EOS not in endless.token_ids
    forever = llm.generate([1], replace(greedy, grammar=Grammar("regex", "a+"), ignore_eos=True))[0].completions[0]
    assert (forever.text, forever.finish_reason) == ("a" * 20, "length")


def test_banned_ends_close_a_text_that_is_whole(build_model, tokenizer) -> None:
    """Where no allowed token is left, a text that meets the grammar ends there, and one that does not is an error."""
    model = build_model("hybrid")
    compiled = compile_grammar(Grammar("regex", "a(?:bc)?"), Codec(tokenizer), VOCAB)
    state = compiled.start([1], frozenset([EOS]))
    assert not state.advance(ord("c"))
    assert not state.may_stop
    assert state.advance(ord("a"))
    assert state.may_stop
    assert not state.done
    banned = SamplingParams(temperature=0, min_tokens=5, max_tokens=9, grammar=Grammar("choice", '["a"]'))
    answer = LLM(model, tokenizer).generate([1], banned)[0].completions[0]
    assert (answer.text, answer.finish_reason) == ("a", "stop")
    # the end of sequence as a part of the text can never be had
    stuck = replace(banned, grammar=Grammar("lark", f'start: "a" <[{EOS}]>'))
    answer = LLM(model, tokenizer).generate([1], stuck)[0].completions[0]
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("a", [ord("a")], "error")
    short = LLM(model, tokenizer).generate(
        [1], replace(banned, grammar=Grammar("regex", "ab?"), ignore_eos=True, logit_bias={98: 9})
    )
    assert short[0].text == "ab"


def test_logprobs_are_of_the_unmasked_distribution(model, tokenizer) -> None:
    """The model's are those of a full pass; the sampled ones are over allowed tokens alone."""
    params = SamplingParams(
        grammar=Grammar("regex", "[ab][01]"), seed=2, max_tokens=5, logprobs=2, logprobs_of=["model", "sampled"]
    )
    answer = LLM(model, tokenizer, speculate=0).generate([8, 9], params)[0].completions[0]
    assert answer.logprobs is not None
    with torch.no_grad():
        table = model(torch.tensor([[8, 9, *answer.token_ids]])).logits[0]
    for j, allowed in enumerate([list(b"ab"), list(b"01")]):
        entry = answer.logprobs[j]
        assert entry.model == pytest.approx(float(table[1 + j].log_softmax(-1)[entry.token]), abs=2e-5)
        part = table[1 + j, allowed].log_softmax(-1)
        assert entry.sampled == pytest.approx(float(part[allowed.index(entry.token)]), abs=1e-4)
        assert [i for i, _ in entry.top] == table[1 + j].topk(2).indices.tolist()


def test_tokens_of_several_characters_and_a_padded_embedding(tokenizer) -> None:
    """A vocabulary with merges, smaller than the logits: no id without a token is ever allowed, and answers validate."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from alloy.models.configs import DecoderConfig
    from alloy.models.llama import DecoderLM

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    samples = [json.dumps({"name": "anna", "age": i, "tags": ["red", None], "code": "AB-12"}) for i in range(50)]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(samples, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    fast.add_tokens(["spare"])
    assert any(len(fast.decode([i])) > 6 for i in range(len(fast)))
    vocab = len(fast) + 37
    config = DecoderConfig(
        kind="llama",
        vocab=vocab,
        hidden=24,
        num_layers=1,
        num_heads=3,
        num_kv_heads=1,
        head_dim=8,
        ffn=40,
        max_positions=160,
    )
    model = DecoderLM(config)
    model.init_weights(0)
    params = SamplingParams(grammar=schema_grammar(PERSON), n=16, seed=5, max_tokens=120, temperature=2.0)
    answers = LLM(model.eval(), fast).generate("x", params)[0].completions
    assert all(t < len(fast) for a in answers for t in a.token_ids)
    for answer in answers:
        if answer.finish_reason == "stop":
            check(PERSON, answer.text)
    assert sum(a.finish_reason == "stop" for a in answers) > 8


def deep(levels: int) -> object:
    return {"items": deep(levels - 1)} if levels > 1 else {}


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("xml", "", 'grammar kind = "xml" is unknown; use one of json_object'),
        ("regex", 5, "regex must be a text, not int"),
        ("json_schema", " " * 262145, "json_schema has 262,145 bytes; at most 262,144"),
        ("json_schema", json.dumps(deep(65)), "json_schema nests 65 levels deep; at most 64"),
        ("json_schema", "[" * 100_000, "json_schema nests 100000 levels deep"),
        ("json_schema", '{"minimum": 1e999}', "json_schema has the number 1e999, which is not finite"),
        ("json_schema", '{"const": "\\ud800"}', "json_schema is not supported: "),
        ("regex", "\ud800", "surrogates not allowed"),
        ("json_schema", "{", "json_schema is not JSON: Expecting property name"),
        ("json_schema", "3", "json_schema must be an object, or true or false"),
        (
            "json_schema",
            '{"properties": {"a": {"items": {"not": {}}}}}',
            r"\$\.properties\.a\.items\.not: the keyword \"not\"",
        ),
        (
            "json_schema",
            '{"properties": {"not": {"type": "array", "uniqueItems": true}}}',
            r"\$\.properties\.not\.uniqueItems",
        ),
        ("json_schema", '{"anyOf": [true, {"if": true, "then": false}]}', r"\$\.anyOf\.1\.if: the keyword"),
        (
            "json_schema",
            '{"properties": {"a": {"format": "zebra", "type": "string"}}}',
            r"a\.format is not supported: Unknown",
        ),
        ("json_schema", '{"items": {"pattern": "(?=a)b"}}', r"\$\.items\.pattern is not supported.*look-ahead"),
        ("json_schema", '{"items": {"type": "strnig"}}', r"\$\.items\.type is not supported: Invalid type"),
        ("json_schema", '{"items": {"pattern": "[a[b]]"}}', r"at \$\.items\.pattern: brackets within brackets"),
        ("json_schema", '{"items": {"$ref": "http://x.y/z"}}', r"\$\.items\.\$ref is not supported"),
        (
            "json_schema",
            '{"oneOf": [{"type": "integer"}, {"type": "number"}]}',
            r"\$\.oneOf: oneOf is supported only where",
        ),
        ("json_schema", '{"type": "object", "minProperties": 2}', r"at \$: minProperties = 2 cannot be held"),
        ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}', r"minimum \(5\) is greater"),
        ("json_schema", '{"enum": []}', "Unsatisfiable"),
        ("json_schema", "false", "cannot be met by any answer: what it requires is false"),
        ("json_schema", '{"$ref": "#"}', "cannot be met by any answer"),
        (
            "json_schema",
            '{"type": "object", "properties": {"n": {"$ref": "#"}}, "required": ["n"]}',
            "cannot be met by any answer: what it requires is false or contains itself without end",
        ),
        ("regex", "(", "regex is not supported: .*unclosed group"),
        ("regex", r"\bx", "lookarounds not supported"),
        ("regex", r"[^\s\S]", "regex cannot be met by any answer"),
        ("regex", "", "regex admits the empty answer alone"),
        ("choice", "[]", "choice must be a JSON list of at least one text"),
        ("choice", '["a", ""]', r"choice\[1\] = \"\" is not a text of at least one"),
        ("choice", "a", "choice is not a JSON list of texts"),
        ("lark", "start: x", "unknown name"),
    ],
)
def test_what_cannot_be_held_is_refused(tokenizer, kind, text, message) -> None:
    """One sentence, with the place in the schema where there is one."""
    with pytest.raises(RequestError, match=message) as caught:
        compile_grammar(Grammar(kind, text), Codec(tokenizer), VOCAB)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, ["0.25", "0.5"], ["0", "0.0", "0.51"]),
        ({"type": "number", "minimum": -2.5, "exclusiveMaximum": -2}, ["-2.5", "-2.01"], ["-2", "-2.0"]),
        ({"allOf": [{"exclusiveMinimum": 2}, {"maximum": 2.5}], "type": "number"}, ["2.1"], ["2", "2.0"]),
        ({"type": "number", "exclusiveMaximum": 0, "maximum": 3}, ["-0.5", "-7"], ["0", "3"]),
        ({"type": "string", "pattern": '^[^"]{2}$'}, ['"a\\\\"', '"\\n' + 'b"'], ['"a\\""', '"\\"\\""']),
        (
            {
                "$ref": "#/components/schemas/x",
                "components": {"schemas": {"x": {"pattern": '^[^"]$', "type": "string"}}},
            },
            ['"a"'],
            ['"\\""'],
        ),
        (
            {"type": "object", "properties": {"pattern": {"const": {"pattern": "[a"}}}, "required": ["pattern"]},
            ['{"pattern":{"pattern":"[a"}}'],
            ["{}"],
        ),
        (
            {
                "type": "object",
                "properties": {"default": {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}},
                "required": ["default"],
            },
            ['{"default":0.25}'],
            ['{"default":0}'],
        ),
        ({"type": "string", "pattern": "^[^\\\\]$"}, ['"\\""', '"é"'], ['"\\\\"']),
        ({"type": "string", "pattern": "^[\\x00-\\x20]$"}, ['" "', '"\\t"', '"\\u0001"'], ['"\\""', '"a"']),
        ({"type": "string", "pattern": '^\\[[^"]\\]$'}, ['"[x]"'], ['"[\\"]"', '"x"']),
        (
            {"type": "object", "patternProperties": {'^[^"]$': {"type": "null"}}, "additionalProperties": False},
            ['{"a":null}', "{}"],
            ['{"\\"":null}', '{"ab":null}'],
        ),
    ],
)
def test_texts_that_a_schema_admits_and_others(tokenizer, schema, good, bad) -> None:
    """Open bounds at whole numbers and classes without the quote or the backslash, judged by `jsonschema`."""
    validator = jsonschema.Draft202012Validator(schema)
    compiled = compile_grammar(schema_grammar(schema), Codec(tokenizer), VOCAB)
    for text in [*good, *bad]:
        state = compiled.start([1], frozenset([EOS]))
        assert validator.is_valid(json.loads(text)) == (text in good), text
        assert (all(state.advance(byte) for byte in text.encode()) and state.may_stop) == (text in good), text


def test_schemas_that_go_round_are_fine_where_they_can_end(tokenizer) -> None:
    """Recursion through options, optional keys and lists that may be empty; a set of options of its own counts as no form
    of its own name."""
    codec = Codec(tokenizer)
    for rest in (
        {"type": "object", "properties": {"n": {"$ref": "#"}}},
        {"type": "array", "items": {"$ref": "#"}},
        {"type": ["array", "null"], "items": {"$ref": "#"}, "minItems": 1},
        {
            "anyOf": [{"$ref": "#/$defs/a~1b"}, {"const": 1}],
            "$defs": {"a/b": {"type": "array", "minItems": 1, "items": {"$ref": "#"}}},
        },
    ):
        compile_grammar(schema_grammar(rest), codec, VOCAB)


def test_grammars_are_cached_and_bounded_in_time(tokenizer, monkeypatch) -> None:
    """The same text is compiled once per tokenizer; a compilation beyond its time is refused; without the library one
    sentence says what to install."""
    codec = Codec(tokenizer)
    once = compile_grammar(schema_grammar(PERSON), codec, VOCAB)
    assert compile_grammar(schema_grammar(PERSON), codec, VOCAB) is once
    assert compile_grammar(schema_grammar(TREE), codec, VOCAB) is not once
    monkeypatch.setattr(grammars, "CACHED", 1)
    compile_grammar(Grammar("json_object"), codec, VOCAB)
    assert compile_grammar(schema_grammar(PERSON), codec, VOCAB) is not once
    monkeypatch.setattr(grammars, "COMPILE_S", 1e-9)
    wide = {"type": "object", "properties": {f"k{i}": PERSON for i in range(500)}}
    with pytest.raises(RequestError, match="json_schema takes more than 1e-09 s to compile; make it simpler"):
        compile_grammar(schema_grammar(wide), codec, VOCAB)
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(
        RequestError, match=r'needs llguidance, which is not installed: pip install "alloy-lm\[serve\]"'
    ):
        compile_grammar(Grammar("json_object"), Codec(tokenizer), VOCAB)


def test_a_model_without_tokenizer_refuses(model) -> None:
    """Before any work."""
    with pytest.raises(RequestError, match="a grammar needs a tokenizer, and this model has none"):
        LLM(model).generate([1], SamplingParams(grammar=Grammar("json_object")))


def test_bitmask_by_bits() -> None:
    """Against each bit read from Python integers, for a vocabulary that ends inside a word."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 2, 77, generator=generator)
    bits = torch.randint(-(2**31), 2**31 - 1, (3, 2, 4), dtype=torch.int32, generator=generator)
    out = apply_bitmask(logits, bits)
    for i in range(3):
        for j in range(2):
            words = [int(w) & 0xFFFFFFFF for w in bits[i, j]]
            for token in range(77):
                is_set = words[token // 32] >> (token % 32) & 1
                assert float(out[i, j, token]) == (float(logits[i, j, token]) if is_set else -torch.inf)
