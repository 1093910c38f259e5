"""Server-sent events however they are cut, and the meaning of what OpenAI-compatible servers send."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alloy.core.client import Delta, EventReader, ServerError, Usage, api_root, headers, read_delta, refusal
from alloy.errors import RequestError


@given(
    st.lists(st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"])), min_size=1)),
    st.sampled_from(["\n", "\r\n"]),
    st.lists(st.integers(0, 400)),
)
def test_events_come_whole_however_the_stream_is_cut(events: list[list[str]], end: str, cuts: list[int]) -> None:
    """Comments and other fields between them change nothing; lines of one event are joined."""
    stream = "".join(
        f": alive{end}" + "".join(f"data: {line}{end}" for line in lines) + f"id: 1{end}{end}" for lines in events
    ).encode()
    places = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    reader = EventReader()
    found = [data for a, b in pairwise(places) for data in reader.feed(stream[a:b])]
    assert found == ["\n".join(lines) for lines in events]


def test_the_last_event_needs_no_space_and_other_line_ends_count() -> None:
    """ "data:x" and lone carriage returns, as the standard allows."""
    assert EventReader().feed(b"data:x\n\ndata:  y\n\n") == ["x", " y"]
    assert EventReader().feed(b"data: a\r\rdata: b\r\r\n") == ["a", "b"]
    assert EventReader().feed(b"data: cut off") == []


@pytest.mark.parametrize(
    ("chunk", "want"),
    [
        ({"choices": [{"delta": {"role": "assistant", "content": ""}}]}, Delta()),
        ({"choices": [{"delta": {"content": "hi"}, "finish_reason": None}], "usage": None}, Delta("hi")),
        ({"choices": [{"delta": {"reasoning": "hm", "reasoning_content": "hm"}}]}, Delta(thought="hm")),
        ({"choices": [{"delta": {"reasoning_content": "hm"}}]}, Delta(thought="hm")),
        ({"choices": [{"text": "on", "finish_reason": "stop"}]}, Delta("on", finish_reason="stop")),
        ({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}, Delta(usage=Usage(3, 2))),
        (
            {
                "usage": {
                    "prompt_tokens": 3,
                    "completion_tokens": 2,
                    "prompt_tokens_details": {"cached_tokens": 1},
                    "completion_tokens_details": {"reasoning_tokens": 1},
                }
            },
            Delta(usage=Usage(3, 2, 1, 1)),
        ),
    ],
)
def test_chunks(chunk: dict, want: Delta) -> None:
    """Chat and completion chunks, both names of thoughts, usage."""
    assert read_delta(json.dumps(chunk)) == want


def test_errors_keep_the_servers_words() -> None:
    """OpenAI's body, FastAPI's, plain text, nothing; and events that are no chunks."""
    openai = {"error": {"message": "too long", "type": "invalid_request_error", "param": None, "code": None}}
    for body, message in {
        json.dumps(openai): "the server answered 400: too long",
        '{"detail": "Not Found"}': "the server answered 400: Not Found",
        "<html>": "the server answered 400: <html>",
        "": "the server answered 400: no message",
    }.items():
        assert str(refusal(400, body.encode())) == message
    with pytest.raises(ServerError, match="the server broke off: too long") as error:
        read_delta(json.dumps(openai))
    assert error.value.kind == "error event invalid_request_error"
    for data in ("{", "[1]"):
        with pytest.raises(ServerError, match="the server sent an event that is not"):
            read_delta(data)


def test_addresses() -> None:
    """With and without the version; the key is a bearer's."""
    for url in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"):
        assert api_root(url) == "http://h:1/v1"
    assert api_root("https://h/api/v3") == "https://h/api/v3"
    for url in ("h:1", "ftp://h", "http://", "http://h:x", "http://h:99999"):
        with pytest.raises(RequestError, match="is not the address of a server"):
            api_root(url)
    assert headers("k")["Authorization"] == "Bearer k"
    assert "Authorization" not in headers(None)
