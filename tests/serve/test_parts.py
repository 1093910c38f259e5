"""Thought, answer and tool calls apart, at every way of cutting the text into pieces."""

import json
import re
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from alloy.engine.core import LLM
from alloy.engine.detokenizer import Detokenizer
from alloy.engine.request import Completion, Request, SamplingParams
from alloy.serve.answer import Choice, Layout
from alloy.serve.model import ServedModel
from alloy.serve.reasoning import Split
from alloy.serve.settings import ServerSettings
from alloy.serve.tools import FORMATS, Call, ToolParser, format_of
from tests.engine.conftest import SPECIAL, build, byte_tokenizer

THINK = ("<think>", "</think>")
# models without and with single tokens for the markers
SERVED = [
    ServedModel(LLM(build("attention"), byte_tokenizer(special)), ["m"], ServerSettings())
    for special in (SPECIAL[:3], SPECIAL)
]
# whatever a value holds, except the end of its own call
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.text(alphabet="abc_.-09", min_size=1, max_size=6)
TAGS = st.sampled_from(
    ["</tool_call>", "<tool_call>", "</parameter>", "<function=x>", '"', "\\", "\n", "{", "</TOOLCALL>"]
)
ARGUMENTS = st.dictionaries(NAMES, VALUES | st.lists(TAGS | st.text(max_size=3), max_size=4).map("".join), max_size=3)


def split(text: str, cuts: list[int], **options: Any) -> tuple[str, str]:
    parts: dict[str, str] = {"thought": "", "answer": ""}
    splitter = Split(THINK, **options)
    at = 0
    for cut in sorted({*cuts, len(text)}):
        for kind, piece in splitter.push(text[at:cut]):
            parts[kind] += piece
        at = max(at, cut)
    for kind, piece in splitter.finish():
        parts[kind] += piece
    return parts["thought"], parts["answer"]


@pytest.mark.parametrize(
    ("text", "inside", "thought", "answer"),
    [
        ("a</think>b", True, "a", "b"),
        ("\na\n</think>\n\nb\n", True, "a", "b\n"),
        ("<think>\na\n\nb\n</think>\nc", False, "a\n\nb", "c"),
        ("  <think>a</think>b", False, "a", "b"),
        ("b <think>a</think>", False, "", "b <think>a</think>"),
        ("a</think>b</think>c", True, "a", "b</think>c"),
        ("a", True, "a", ""),
        ("</think>", True, "", ""),
        ("a</thin", True, "a</thin", ""),
        ("<thin", False, "", "<thin"),
        ("a < b", False, "", "a < b"),
        ("\n\n", True, "", ""),
        ("a\n\n", True, "a", ""),
    ],
)
def test_thought_and_answer_however_the_text_is_cut(text: str, inside: bool, thought: str, answer: str) -> None:
    """By hand; in one piece, in single characters, and cut at each place."""
    for cuts in ([], list(range(len(text))), *([i] for i in range(len(text)))):
        assert split(text, cuts, is_inside=inside) == (thought, answer), cuts


def test_a_tool_call_ends_a_thought_that_was_left_open() -> None:
    assert split("hm<tool_call>x", [3, 6], is_inside=True, ends=("<tool_call>",)) == ("hm", "<tool_call>x")


@given(st.lists(st.sampled_from(["<think>", "</think>", "<", "think", ">", "\n", "a", " "]), max_size=12).map("".join),
       st.lists(st.integers(0, 60), max_size=6), st.booleans())  # fmt: skip
def test_cuts_change_nothing_and_no_text_is_lost(text: str, cuts: list[int], inside: bool) -> None:
    whole = split(text, [], is_inside=inside)
    assert split(text, cuts, is_inside=inside) == whole
    kept = re.sub(r"\s|</?think>", "", "".join(whole))
    assert kept == re.sub(r"\s|</?think>", "", text)


def parse(format: str, text: str, cuts: list[int], schemas: Any = None, **options: Any) -> tuple[str, list[Call]]:
    parser = ToolParser(format, schemas or {}, **options)
    pieces, at = [], 0
    for cut in sorted({*cuts, len(text)}):
        pieces += parser.push(text[at:cut])
        at = max(at, cut)
    pieces += parser.finish()
    return "".join(p for p in pieces if isinstance(p, str)), [p for p in pieces if isinstance(p, Call)]


def render(format: str, name: str, arguments: dict[str, Any]) -> str:
    """A call as the models' templates write it."""
    if format == "hermes":
        return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
    if format == "nemotron":
        return f"<TOOLCALL>{json.dumps([{'name': name, 'arguments': arguments}], ensure_ascii=False)}</TOOLCALL>"
    if format == "llama_json":
        return json.dumps({"name": name, "parameters": arguments})
    rows = [
        f"<parameter={k}>\n{v if isinstance(v, str) else json.dumps(v)}\n</parameter>\n" for k, v in arguments.items()
    ]
    return f"<tool_call>\n<function={name}>\n{''.join(rows)}</function>\n</tool_call>"


def schema(arguments: dict[str, Any]) -> dict[str, Any]:
    kinds = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
    return {"properties": {k: {"type": kinds.get(type(v), "null")} for k, v in arguments.items()}}


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=150)
@given(name=NAMES, arguments=ARGUMENTS, cuts=st.lists(st.integers(0, 80), max_size=4))
def test_what_is_written_is_read(format: str, name: str, arguments: dict[str, Any], cuts: list[int]) -> None:
    """Any arguments, tags and quotes in them included, in any pieces."""
    text = render(format, name, arguments)
    content, calls = parse(format, text, cuts, {name: schema(arguments)})
    assert content == ""
    assert [(c.name, json.loads(c.arguments)) for c in calls] == [(name, arguments)]


@pytest.mark.parametrize("format", ["hermes", "qwen3_coder", "nemotron"])
@given(data=st.data())
def test_text_around_calls_stays(format: str, data: st.DataObject) -> None:
    words = st.text(alphabet="ab<>/ \n", max_size=8)
    before, after = data.draw(words), data.draw(words)
    call = render(format, "f", {"x": 1})
    text = before + call + after
    content, calls = parse(format, text, data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    assert len(calls) == 1
    assert content.rstrip() == (before.rstrip() + after).rstrip()


BROKEN = [
    ("hermes", '<tool_call>{"name": "f", "arguments": {</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call> rest'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}}'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "open</tool_call>'),
    ("qwen3_coder", "<tool_call><function=f><parameter=x>1</function></tool_call>"),
    ("qwen3_coder", "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n"),
    ("nemotron", "<TOOLCALL>[]</TOOLCALL>"),
    ("nemotron", '<TOOLCALL>[{"name": "f", "arguments": {}}, 3]</TOOLCALL>'),
    ("llama_json", '{"name": "f"'),
    ("llama_json", '{"answer": 3}'),
    ("llama_json", "plain"),
    # half a character is no text, and NaN no JSON
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": NaN}"}</tool_call>'),
]


@pytest.mark.parametrize(("format", "text"), BROKEN)
def test_a_call_that_does_not_parse_is_content_to_the_letter(format: str, text: str) -> None:
    for cuts in ([], list(range(len(text)))):
        assert parse(format, text, cuts) == (text, [])


def test_several_calls_in_their_own_ways() -> None:
    two = '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"a": "x; y"}}'
    assert [c.name for c in parse("llama_json", "<|python_tag|>" + two, [5])[1]] == ["f", "g"]
    both = '<TOOLCALL>[{"name": "f", "arguments": {}}, {"name": "g", "arguments": "{}"}]</TOOLCALL>'
    assert [c.name for c in parse("nemotron", both, [])[1]] == ["f", "g"]
    assert parse("nemotron", both, [], parallel=False) == (both, [])


def test_values_are_typed_by_their_schema_alone() -> None:
    text = render("qwen3_coder", "f", {"a": "1", "b": "1", "c": "1", "d": "null", "e": "x"})
    kinds = {
        "a": {"type": "integer"},
        "b": {"type": "string"},
        "d": {"type": ["string", "null"]},
        "e": {"type": "integer"},
    }
    arguments = json.loads(parse("qwen3_coder", text, [], {"f": {"properties": kinds}})[1][0].arguments)
    assert arguments == {"a": 1, "b": "1", "c": "1", "d": None, "e": "x"}


def test_the_template_shows_the_format() -> None:
    assert format_of("... <tool_call>\n<function=...") == "qwen3_coder"
    assert format_of("<tool_call>{{ x }}") == "hermes"
    assert format_of("<TOOLCALL>") == "nemotron"
    assert format_of("<|python_tag|>") == "llama_json"


@given(st.lists(st.sampled_from(["<think>", "</think>", "</", "think>", "\n", "a", "é", "<"]), max_size=10).map("".join),
       st.lists(st.integers(0, 80), max_size=6), st.booleans(), st.booleans())  # fmt: skip
def test_tokens_of_thought_are_those_of_its_text(text: str, cuts: list[int], inside: bool, single: bool) -> None:
    """However an answer is cut into increments, its count is that of the tokens between its markers, of which the answer
    knows the text; markers of one token and of several."""
    model = SERVED[single]
    codec = model.llm.codec
    assert codec is not None
    ids = codec.encode(text, "text", add_special_tokens=False)
    choice = Choice(0, Request(id="1", token_ids=[1], params=SamplingParams()), Layout(model, is_inside=inside))
    detokenizer, at = Detokenizer(codec.decode, codec.skipped), 0
    for cut in sorted({*cuts, len(ids)}):
        new = ids[at:cut]
        choice.feed(Completion(0, "".join(detokenizer.push(i) for i in new), new))
        at = max(at, cut)
    opened = text if inside else text.lstrip().removeprefix(THINK[0])
    has_thought = inside or opened != text.lstrip()
    thought = opened.partition(THINK[1])[0] if has_thought else ""
    # a single token counts as a marker also where the text has it as text
    assume(not single or THINK[0] not in opened)
    assert choice.reasoning_tokens == len(codec.encode(thought, "text", add_special_tokens=False))
    choice.feed(Completion(0, detokenizer.finish(), [], finish_reason="stop"))
    assert choice.thought == thought.strip("\n")
