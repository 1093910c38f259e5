"""Requests as pydantic models, and JSON bodies into them: strict types, unknown fields kept, `null` as left out.

What the models cannot say (relations between fields, limits of the served model) is checked where the request is built.
"""

import json
import math
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic import Json as JsonText

from alloy.core.toml import is_list, is_table
from alloy.serve.errors import bad, from_validation

Count = Annotated[int | None, Field(ge=0)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field()]
Stop = Annotated[str, Field(min_length=1)] | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Json = dict[str, Any]


class Body(BaseModel):
    """Base of all requests: types are not converted, and fields of other servers are kept so that they can be named."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class StreamOptions(Body):
    """What a stream carries beside the answer."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class StructuredOutputs(Body):
    """One of four shapes that the answer must have."""

    json_: Json | str | bool | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = None


class JsonSchema(Body):
    """A named schema of `response_format`."""

    name: str | None = None
    schema_: Json | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """Free text, any JSON object, or JSON of one schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Function(Body):
    """A function that the model may call."""

    name: Annotated[str, Field(min_length=1, max_length=128)]
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool; functions are the only kind. `tool_choice` names one in the same way."""

    type: Literal["function"]
    function: Function


class CalledFunction(Body):
    """Name and arguments of a call in a past turn; no text at all means no arguments."""

    name: str
    arguments: Annotated[JsonText[Json], BeforeValidator(lambda text: "{}" if text == "" else text)]


class ToolCall(Body):
    """A call in a past turn."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Part(Body):
    """A piece of a message; only text can be read."""

    type: str
    text: str | None = None
    refusal: str | None = None


class ChatMessage(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class Asked(Body):
    """What every request for an answer has."""

    model: str | None = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    stream: bool | None = None
    user: str | None = None


class Recorded(Body):
    """What newer APIs have besides: accepted, without effect here, except for `parallel_tool_calls` and `store`."""

    parallel_tool_calls: bool | None = None
    metadata: Json | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class Conversation(Body):
    """What decides, beside the messages, how a conversation is laid out."""

    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | Tool | None = None
    reasoning_effort: Effort | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Json | None = None

    @property
    def declared(self) -> list[Json]:
        """The functions that may be called."""
        tools = [] if self.tool_choice == "none" else self.tools or []
        return [tool.function.model_dump(exclude_none=True) for tool in tools]


class Sampled(Asked):
    """What chat and completions share: how tokens are chosen and when the answer ends."""

    max_tokens: Count = None
    stop: Stop | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    # extensions, with vLLM's names
    top_k: Annotated[int | None, Field(ge=-1, le=2**31)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    repetition_penalty: Annotated[float | None, Field(gt=0, le=100)] = None
    min_tokens: Count = None
    ignore_eos: bool | None = None
    stop_token_ids: Ids | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    prompt_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    return_token_ids: bool | None = None
    cache_salt: str | None = None
    priority: Annotated[int | None, Field(ge=-(2**31), lt=2**31)] = None
    request_id: str | None = None
    # the four names of one limit; null and -1 mean none
    thinking_token_budget: Annotated[int | None, Field(ge=-1)] = None
    thinking_budget: Annotated[int | None, Field(ge=-1)] = None
    reasoning_budget: Annotated[int | None, Field(ge=-1)] = None
    nvext: Json | None = None
    thinking_grace: Count = None
    thinking_close_text: str | None = None


class ChatRequest(Sampled, Conversation, Recorded):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    n: Annotated[int | None, Field(ge=1, le=16)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    include_reasoning: bool | None = None
    prompt_cache_retention: str | None = None
    verbosity: str | None = None
    modalities: list[str] | None = None
    chat_template: str | None = None


class CompletionRequest(Sampled):
    """POST /v1/completions."""

    prompt: str | list[str] | Ids | list[Ids]
    n: Annotated[int | None, Field(ge=1, le=128)] = None
    best_of: Annotated[int | None, Field(ge=1, le=128)] = None
    echo: bool | None = None
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    suffix: str | None = None


class TextFormat(JsonSchema):
    """Shape of the text of a response."""

    type: Literal["text", "json_object", "json_schema"]


class ResponseText(Body):
    """`text` of a response request."""

    format: TextFormat | None = None
    verbosity: str | None = None


class Reasoning(Body):
    """`reasoning` of a response request."""

    effort: Effort | None = None
    summary: str | None = None


class ResponseRequest(Asked, Recorded):
    """POST /v1/responses."""

    input: str | Annotated[list[Json], Field(min_length=1)]
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: Annotated[int | None, Field(ge=1)] = None
    background: bool | None = None
    tools: list[Json] | None = None
    tool_choice: Literal["none", "auto", "required"] | Json | None = None
    reasoning: Reasoning | None = None
    text: ResponseText | None = None
    truncation: Literal["auto", "disabled"] | None = None
    include: list[str] | None = None


class TokenizeRequest(Conversation):
    """POST /tokenize: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Ids


AnyBody = TypeVar("AnyBody", bound=Body)

# fields that would change what the answer means if they were left alone, and the mend
REFUSED = {
    "audio": "this model answers in text; leave it out",
    "web_search_options": "this server does not search the web; leave it out",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "chat_template": "templates of requests are not trusted; start the server with serve.trust_request_template=true",
    "suffix": "this model cannot fill in the middle; leave it out",
    "use_beam_search": "this server does not search with beams; leave it out",
}


def validated(model: type[AnyBody], data: Json) -> AnyBody:
    """A request from its parsed body."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise from_validation(error, data) from error


def parse_body(model: type[AnyBody], raw: bytes) -> AnyBody:
    """A request from its bytes, JSON as the standard has it; every complaint is a 400 that names the field."""
    try:
        data: object = json.loads(raw.decode("utf-8"), parse_constant=_finite, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise bad(None, f"the body is not UTF-8 at byte {error.start}; encode it as UTF-8") from error
    except json.JSONDecodeError as error:
        what = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise bad(None, f"the body is not valid JSON: {what}") from error
    except RecursionError as error:
        raise bad(None, "the body is nested too deeply; flatten it") from error
    except ValueError as error:
        raise bad(None, "the body has a whole number of thousands of digits; shorten it") from error
    # only an escape can bring half a character
    for path, text in _strings(data, ()) if b"\\u" in raw else ():
        if half := re.search("[\ud800-\udfff]", text):
            name = ".".join(path)
            where = f"{name or 'the body'} holds a lone surrogate at character {half.start()}"
            raise bad(name or None, f"{where}, which is not text; remove it")
    if not is_table(data):
        raise bad(None, "the body must be a JSON object")
    return validated(model, data)


def refuse_unserved(body: Body, trust_template: bool = False) -> None:
    """400 for fields that would change the meaning of the answer if they were ignored."""
    if isinstance(body, Sampled) and body.stream_options is not None and not body.stream:
        raise bad("stream_options", "stream_options needs stream = true")
    extra = body.model_extra or {}
    for name, mend in REFUSED.items():
        value = extra.get(name, getattr(body, name, None))
        if value is not None and not (name == "chat_template" and trust_template):
            raise bad(name, f"{name} is not supported: {mend}")
    modalities = getattr(body, "modalities", None)
    if modalities is not None and modalities != ["text"]:
        raise bad("modalities", 'modalities must be ["text"]: this model answers in text')


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise bad(None, f"the body has the number {text[:32]}, which is too large or none; send a finite one")
    return value


def _strings(data: object, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every string of a document and where it stands; a key stands where its table does."""
    if isinstance(data, str):
        yield path, data
    elif is_table(data):
        for name, value in data.items():
            yield path, name
            yield from _strings(value, (*path, name))
    elif is_list(data):
        for i, value in enumerate(data):
            yield from _strings(value, (*path, str(i)))
