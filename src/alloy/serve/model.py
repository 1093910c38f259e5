"""The served model: its names and defaults, and requests of the API into requests of the engine.

Templates, tokenisation and grammar compilation happen here, in worker threads, never in the engine's.
"""

import json
import math
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, cast, get_args

from jinja2 import Environment, TemplateError, meta, nodes

from alloy.engine.codec import NO_MARKERS, Codec
from alloy.engine.grammar import Grammar, Kind, compile_grammar
from alloy.engine.request import Request, SamplingParams
from alloy.errors import RecipeError, RequestError
from alloy.serve.errors import ApiError, bad, from_request_error
from alloy.serve.protocol import ChatMessage, Conversation, Json, ResponseFormat, Sampled, StructuredOutputs
from alloy.serve.reasoning import ends_inside
from alloy.serve.settings import Sampling, ServerSettings
from alloy.serve.tools import calls_schema, format_of

if TYPE_CHECKING:
    from alloy.engine.core import LLM

# what a template's source may call without being told
_BUILT_IN = {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"}
# what a request may tell the renderer of templates itself
SPECIAL = {"add_generation_prompt", "continue_final_message"}
# fields of a request that the engine knows by the same name
PLAIN = {field.name for field in fields(SamplingParams)} & Sampled.model_fields.keys()
# structured outputs by what the engine calls them
KINDS: dict[str, Kind] = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "lark"}
_TEMPLATE_FAULTS = (TypeError, ValueError, AttributeError, ArithmeticError, LookupError, RecursionError)


@dataclass(frozen=True)
class Prompt:
    """A conversation as the model reads it.

    Attributes:
        ids: token ids
        keep_at: where a snapshot of the state pays
        is_inside: the answer begins inside a thought
        warnings: what was left alone
    """

    ids: list[int]
    keep_at: tuple[int, ...] = ()
    is_inside: bool = False
    warnings: list[str] = field(default_factory=list[str])


class ServedModel:
    """What the routes know of the model.

    Args:
        llm: the model with its tokenizer
        names: what requests call it; the first is its own
        settings: defaults and limits of requests
    """

    def __init__(self, llm: "LLM", names: Sequence[str], settings: ServerSettings) -> None:
        self.llm = llm
        self.names = list(names)
        self.name = self.names[0]
        self.settings = settings
        self.created = int(time.time())
        generation = cast(dict[str, Any], llm.model.generation)
        known = {*get_args(Sampling)} - {"max_tokens"}
        self.defaults = {k: v for k, v in generation.items() if k in known and v is not None}
        self.defaults.update({k: int(v) if k in ("top_k", "max_tokens") else v for k, v in settings.default.items()})
        codec = llm.codec
        template = codec.chat_template if codec else ""
        self.variables = _variables(template)
        self.tool_format = settings.tool_format or format_of(template)
        self.markers = (codec.markers.start, codec.markers.end) if codec and codec.markers else None
        for limit in ("thinking_budget", "max_thinking_budget"):
            if getattr(settings, limit) is not None and self.markers is None:
                raise RecipeError(f"serve.{limit} = {getattr(settings, limit)}, but {NO_MARKERS}; leave it out")
        try:
            SamplingParams(**self.defaults)
        except RequestError as error:
            raise RecipeError(f"serve.default with the model's generation_config.json: {error}") from error

    def check_name(self, name: str | None) -> str:
        """The name that the answer carries; 404 for another model."""
        if name is not None and name not in self.names:
            listed = ", ".join(self.names)
            raise ApiError(404, f'no model "{name[:256]}" here; this server has {listed}', "model_not_found", "model")
        return name or self.name

    def codec(self, param: str) -> Codec:
        """The tokenizer; 400 without one."""
        if self.llm.codec is None:
            raise bad(param, f"{param} needs a tokenizer, and this model has none; send token ids to /v1/completions")
        return self.llm.codec

    def encode(self, text: str, param: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        try:
            return self.codec(param).encode(text, param, add_special_tokens)
        except RequestError as error:
            raise bad(param, str(error)) from error

    def decode(self, *tokens: int) -> str:
        """Text of tokens; none without a tokenizer."""
        return self.llm.codec.decode(tokens) if self.llm.codec else ""

    def chat_prompt(
        self, messages: Sequence[ChatMessage], asked: Conversation, chat_template: str | None = None
    ) -> Prompt:
        """Lay a conversation out; `chat_template`: instead of the model's own."""
        codec = self.llm.codec
        if codec is None or not codec.has_chat_template:
            raise bad("messages", "this model has no chat template; use /v1/completions")
        listed = [_message(m, i) for i, m in enumerate(messages)]
        given = self._template_variables(asked)
        variables = {k: v for k, v in given.items() if k in SPECIAL or k in self.variables}
        if chat_template is not None:
            variables["chat_template"] = chat_template
        if functions := asked.declared:
            variables["tools"] = [{"type": "function", "function": f} for f in functions]
        if variables.get("continue_final_message"):
            if listed[-1]["role"] != "assistant":
                raise bad("continue_final_message", "continue_final_message needs an assistant message at the end")
            variables["add_generation_prompt"] = False
        text = _render(codec, listed, variables)
        ids = codec.encode(text, "a message", add_special_tokens=False)
        keep_at: tuple[int, ...] = ()
        tail = text[-64:]
        if variables.get("add_generation_prompt", True):
            base = _render(codec, listed, {**variables, "add_generation_prompt": False})
            if text.startswith(base) and len(text) > len(base):
                tail = text[len(base) :]
                tail_ids = codec.encode(tail, "the generation prompt", add_special_tokens=False)
                if 0 < len(tail_ids) < len(ids) and ids[-len(tail_ids) :] == tail_ids:
                    keep_at = (len(ids) - len(tail_ids),)
        elif variables.get("continue_final_message"):
            tail = str(listed[-1].get("content") or "")
        is_inside = self.markers is not None and ends_inside(tail, self.markers)
        unknown = [f"template variable {name} is unknown to this model" for name in given if name not in variables]
        return Prompt(ids, keep_at, is_inside, unknown)

    def request(self, body: Sampled, prompt: Prompt, param: str, settings: Mapping[str, Any]) -> Request:
        """The engine's request; `param` is what errors call the prompt, `settings` are this route's own parameters."""
        values = {**self.defaults, **body.model_dump(include=PLAIN, exclude_none=True)}
        # -1 turns it off as well
        values["top_k"] = max(0, values.get("top_k", 0))
        values["logit_bias"] = {_token(k): v for k, v in (body.logit_bias or {}).items()}
        values["thinking_budget"] = self.thinking_budget(body)
        values.update(settings)
        room = self.llm.max_model_len - len(prompt.ids)
        if "max_tokens" not in settings and "max_tokens" in values:
            # a default never makes a prompt too long
            values["max_tokens"] = max(1, min(values["max_tokens"], room))
        try:
            request = Request(
                id=f"{param}-{uuid.uuid4().hex}",
                token_ids=prompt.ids,
                params=SamplingParams(**values),
                priority=body.priority or 0,
                salt=body.cache_salt or "",
                keep_at=prompt.keep_at,
            )
            self.llm.check(request, param)
        except RequestError as error:
            raise from_request_error(error, body.model_fields_set, param) from error
        return request

    def thinking_budget(self, body: Sampled) -> int | None:
        """The one thinking budget that a request asks for, within the server's bound."""
        kwargs: Json = getattr(body, "chat_template_kwargs", None) or {}
        given = {
            "thinking_token_budget": body.thinking_token_budget,
            "thinking_budget": body.thinking_budget,
            "reasoning_budget": body.reasoning_budget,
            "nvext.max_thinking_tokens": (body.nvext or {}).get("max_thinking_tokens"),
            "chat_template_kwargs.thinking_budget": kwargs.get("thinking_budget"),
        }
        found = {name: value for name, value in given.items() if value is not None}
        for name, value in found.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < -1:
                raise bad(name, f"{name} must be a whole number of tokens from 0; -1 means no limit")
        if len(set(found.values())) > 1:
            listed = " and ".join(f"{name} = {value}" for name, value in found.items())
            raise bad(next(iter(found)), f"{listed} are names of one limit; send one of them")
        budget = next(iter(found.values()), self.settings.thinking_budget)
        budget = None if budget is None or budget < 0 else budget
        most = self.settings.max_thinking_budget
        return budget if most is None else min(most, most if budget is None else budget)

    def grammar(self, param: str, kind: Kind, value: Any) -> Grammar:
        """A compiled grammar of the engine's from its text or JSON; 400 with the place of what cannot be compiled."""
        codec = self.codec(param)
        try:
            grammar = Grammar(kind, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
            compile_grammar(grammar, codec, self.llm.model.config.vocab)
        except RequestError as error:
            raise bad(param, str(error)) from error
        return grammar

    def shape(self, format: ResponseFormat | None, structured: StructuredOutputs | None) -> Grammar | None:
        """The grammar of `response_format` or `structured_outputs`; None for free text."""
        asked: list[tuple[str, Kind, Any]] = []
        if format is not None and format.type == "json_object":
            asked.append(("response_format", "json_object", ""))
        elif format is not None and format.type == "json_schema":
            schema = format.json_schema.schema_ if format.json_schema else None
            if schema is None:
                raise bad("response_format.json_schema.schema", "response_format.json_schema.schema is missing")
            asked.append(("response_format", "json_schema", schema))
        if structured is not None:
            given = structured.model_dump(by_alias=True, exclude_none=True)
            asked.extend(
                (f"structured_outputs.{name}", kind, given[name]) for name, kind in KINDS.items() if name in given
            )
        if len(asked) > 1:
            raise bad(asked[1][0], f"{asked[0][0]} and {asked[1][0]} both shape the answer; send one of them")
        return self.grammar(*asked[0]) if asked else None

    def calls_grammar(self, tools: Sequence[Mapping[str, Any]], named: str | None, parallel: bool) -> Grammar:
        """The grammar of calls that must be made: of one function's arguments, or of a list of calls."""
        if named is None:
            return self.grammar("tools", "json_schema", calls_schema(tools, parallel))
        chosen = next((t for t in tools if t["name"] == named), None)
        if chosen is None:
            raise bad("tool_choice.function.name", f'tool_choice names "{named}", which tools does not have')
        return self.grammar("tools", "json_schema", chosen.get("parameters") or {"type": "object"})

    def _template_variables(self, asked: Conversation) -> Json:
        """What a request sets for the template; its own words come before what its effort means."""
        variables: Json = {}
        if asked.reasoning_effort == "none":
            variables["enable_thinking"] = False
        elif asked.reasoning_effort is not None and "reasoning_effort" in self.variables:
            variables["reasoning_effort"] = asked.reasoning_effort
        variables |= asked.chat_template_kwargs or {}
        variables |= asked.model_dump(include=SPECIAL, exclude_none=True)
        if "thinking_budget" not in self.variables:
            # it is a limit of ours
            variables.pop("thinking_budget", None)
        return variables


def _render(codec: Codec, messages: Sequence[Json], variables: Mapping[str, Any]) -> str:
    try:
        return codec.render_chat(messages, variables)
    except RequestError as error:
        raise bad("messages", str(error)) from error
    except _TEMPLATE_FAULTS as error:
        what = type(error).__name__
        raise bad("messages", f"the chat template cannot lay these messages out ({what}); simplify them") from error


def logprob(value: float | None) -> float | None:
    """A log probability that JSON can hold."""
    return value if value is None or math.isfinite(value) else -9999.0


def _message(message: ChatMessage, i: int) -> Json:
    """A message as templates read it: content a string, arguments of calls an object."""
    content, at = message.content, f"messages.{i}.content"
    if isinstance(content, list):
        for k, part in enumerate(content):
            if part.type not in ("text", "input_text", "output_text", "refusal"):
                raise bad(f"{at}.{k}.type", f'{at}.{k}.type is "{part.type[:64]}"; this model reads text alone')
            if part.text is None and part.refusal is None:
                raise bad(f"{at}.{k}.text", f"{at}.{k}.text is missing")
        content = "".join(part.text or part.refusal or "" for part in content)
    if content is None and message.role != "assistant":
        raise bad(at, f"{at} is missing; a {message.role} message needs it")
    data: Json = {"role": "system" if message.role == "developer" else message.role, "content": content or ""}
    data |= message.model_dump(include={"name", "tool_call_id"}, exclude_none=True)
    thought = message.reasoning_content or message.reasoning
    if thought is not None and message.role == "assistant":
        data["reasoning_content"] = data["reasoning"] = thought
    if message.tool_calls:
        data["tool_calls"] = [
            {"id": c.id, "type": "function", "function": c.function.model_dump(include={"name", "arguments"})}
            for c in message.tool_calls
        ]
    return data


def _token(key: str) -> int:
    if not key.isascii() or not key.isdecimal() or len(key) > 18:
        raise bad(f"logit_bias.{key[:64]}", f'logit_bias has the key "{key[:64]}", which is not a token id')
    return int(key)


def _variables(template: str) -> frozenset[str]:
    """Names that a template reads and its caller may set."""
    try:
        # generation blocks are an extension of transformers' own; their content counts all the same
        plain = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        environment = Environment(extensions=["jinja2.ext.loopcontrols"])
        tree = environment.parse(plain)
    except TemplateError:
        return frozenset()
    # a variable with a default set by the template itself is assigned there, and still may be given
    named = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "load"}
    return frozenset((meta.find_undeclared_variables(tree) | named) - _BUILT_IN)
