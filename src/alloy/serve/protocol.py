"""Requests as pydantic models, and JSON bodies into them: strict types, unknown fields kept, `null` as left out.

What the models cannot say (relations between fields, limits of the served model) is checked where the request is built.
"""

import json
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from alloy.core.toml import is_list, is_table
from alloy.serve.errors import ApiError, bad, from_validation

MAX_SCHEMA_BYTES = 256 * 1024
MAX_DEPTH = 64

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
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class FunctionName(Body):
    """The function that must be called."""

    name: str


class NamedTool(Body):
    """`tool_choice` of one function."""

    type: Literal["function"]
    function: FunctionName


class CalledFunction(Body):
    """Name and arguments of a call in a past turn."""

    name: str
    arguments: str


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


class Sampled(Body):
    """What chat and completions share: how tokens are chosen and when the answer ends."""

    model: str | None = None
    max_tokens: Count = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    user: str | None = None
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


class ChatRequest(Sampled):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    n: Annotated[int | None, Field(ge=1, le=16)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    include_reasoning: bool | None = None
    metadata: Json | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    verbosity: str | None = None
    modalities: list[str] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: Json | None = None


class CompletionRequest(Sampled):
    """POST /v1/completions."""

    prompt: str | list[str] | Ids | list[Ids]
    n: Annotated[int | None, Field(ge=1, le=128)] = None
    best_of: Annotated[int | None, Field(ge=1, le=128)] = None
    echo: bool | None = None
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    suffix: str | None = None
    response_format: ResponseFormat | None = None


class TextFormat(Body):
    """Shape of the text of a response."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: Json | None = Field(None, alias="schema")


class ResponseText(Body):
    """`text` of a response request."""

    format: TextFormat | None = None
    verbosity: str | None = None


class Reasoning(Body):
    """`reasoning` of a response request."""

    effort: Effort | None = None
    summary: str | None = None


class ResponseRequest(Body):
    """POST /v1/responses."""

    model: str | None = None
    input: str | Annotated[list[Json], Field(min_length=1)]
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    stream: bool | None = None
    background: bool | None = None
    store: bool | None = None
    tools: list[Json] | None = None
    tool_choice: Literal["none", "auto", "required"] | Json | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: ResponseText | None = None
    metadata: Json | None = None
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    truncation: Literal["auto", "disabled"] | None = None
    include: list[str] | None = None


class TokenizeRequest(Body):
    """POST /tokenize: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Json | None = None


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


def parse_body(model: type[AnyBody], raw: bytes) -> AnyBody:
    """A request from its bytes; every complaint is a 400 that names the field."""
    data = parse_json(raw)
    if not is_table(data):
        raise bad(None, "the body must be a JSON object")
    return validated(model, data)


def validated(model: type[AnyBody], data: Json) -> AnyBody:
    """A request from its parsed body."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise from_validation(error, data) from error


def parse_json(raw: bytes) -> object:
    """JSON as the standard has it: UTF-8, finite numbers, whole characters."""
    try:
        data = json.loads(raw.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite)
    except ApiError:
        raise
    except UnicodeDecodeError as error:
        raise bad(None, f"the body is not UTF-8 at byte {error.start}; encode it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise bad(
            None, f"the body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    except RecursionError as error:
        raise bad(None, "the body is nested too deeply; flatten it") from error
    except ValueError as error:
        raise bad(None, "the body has a whole number of thousands of digits; shorten it") from error
    # only an escape can bring half a character
    if b"\\u" in raw:
        for path, text in _strings(data, ()):
            half = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
            if half is not None:
                name = ".".join(path)
                message = (
                    f"{name or 'the body'} holds a lone surrogate at character {half}, which is not text; remove it"
                )
                raise bad(name or None, message)
    return data


def check_schema(schema: object, param: str) -> str:
    """A schema as text, within bounds."""
    text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
    if len(text.encode()) > MAX_SCHEMA_BYTES:
        raise bad(param, f"{param} has {len(text.encode()):,} bytes; at most {MAX_SCHEMA_BYTES:,} are compiled")
    if _depth(schema) > MAX_DEPTH:
        raise bad(param, f"{param} is nested {_depth(schema)} levels deep; at most {MAX_DEPTH} are compiled")
    return text


def refuse_unserved(body: Body, trust_template: bool = False) -> None:
    """400 for fields that would change the meaning of the answer if they were ignored."""
    extra = body.model_extra or {}
    for name, mend in REFUSED.items():
        value = extra.get(name, getattr(body, name, None))
        if value is not None and not (name == "chat_template" and trust_template):
            raise bad(name, f"{name} is not supported: {mend}")
    modalities = getattr(body, "modalities", None)
    if modalities is not None and modalities != ["text"]:
        raise bad("modalities", 'modalities must be ["text"]: this model answers in text')


def unknown_fields(body: Body) -> list[str]:
    """Names that no API of ours has."""
    return sorted(name for name, value in (body.model_extra or {}).items() if value is not None)


def _no_constant(name: str) -> NoReturn:
    raise bad(None, f"the body has the number {name}, which JSON does not know; send a finite one")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise bad(None, f"the body has the number {text[:32]}, which is too large; send a finite one")
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


def _depth(data: object) -> int:
    inner = data.values() if is_table(data) else data if is_list(data) else ()
    return 1 + max(map(_depth, inner), default=0)
