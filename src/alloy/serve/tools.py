"""Tool calls out of an answer's text, in the formats that models write, whole or as it grows.

Text outside calls is content. A call is handed on once it is complete and parses; one that does not is content, so
nothing is ever dropped, and a stream gives what the whole text gives.

Formats: hermes `<tool_call>{"name", "arguments"}</tool_call>` (Hermes, Qwen), qwen3_coder `<tool_call><function=NAME>
<parameter=KEY>VALUE</parameter></function></tool_call>` (Nemotron 3), nemotron `<TOOLCALL>[...]</TOOLCALL>` (Nano v2),
llama_json `{"name", "parameters"}` as the whole answer, and calls: a JSON list that a grammar has enforced.
"""

import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from alloy.core.toml import is_list, is_table
from alloy.serve.reasoning import held_back

PYTHON_TAG = "<|python_tag|>"
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>\s*(.*?)\s*</function>\s*", re.DOTALL)
# a value may hold closing tags: its own is the one before the next parameter or the end
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>(.*?)</parameter>\s*(?=<parameter=[^>\n]+>|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """One call: the function's name and its arguments as JSON."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")


class _Written(BaseModel):
    """A call as JSON; some models write the arguments as a string of JSON."""

    model_config = ConfigDict(strict=True)
    name: Annotated[str, Field(min_length=1)]
    arguments: Annotated[
        dict[str, Any], BeforeValidator(lambda value: _loads(value) if isinstance(value, str) else value)
    ] = Field({}, validation_alias=AliasChoices("arguments", "parameters"))


_WRITTEN = TypeAdapter(list[_Written])
Piece = str | Call
FormatName = Literal["hermes", "qwen3_coder", "nemotron", "llama_json"]
Schemas = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Format:
    """How calls stand in a text.

    Attributes:
        opens: what begins a call; empty: the whole answer is one if it begins with "{", "[" or the Python tag
        closes: what ends it
        parse: the text between, with the declared parameters of each function, to calls; None if it does not parse
        is_open: whether `closes` found here stands inside a value
    """

    opens: str
    closes: str
    parse: Callable[[str, Schemas], list[Call] | None]
    is_open: Callable[[str], bool]


class ToolParser:
    """Calls and content of one growing answer.

    Args:
        format: a name of FORMATS
        schemas: JSON schemas of the parameters of each declared function
        parallel: False: one call; further ones are content
        named: the text is the arguments of this function, as a grammar has enforced
    """

    def __init__(self, format: FormatName, schemas: Schemas, parallel: bool = True, named: str | None = None) -> None:
        self._format = FORMATS[format]
        self._schemas = schemas
        self._parallel = parallel
        self._named = named
        self._held = ""
        self._calls = 0
        self._is_content = False

    @property
    def opens(self) -> tuple[str, ...]:
        """What begins a call inside a text."""
        return (self._format.opens,) if self._format.opens else ()

    def push(self, text: str) -> list[Piece]:
        """Pieces that became certain with `text`."""
        self._held += text
        pieces: list[Piece] = []
        if self._format.opens:
            while self._held and self._advance(pieces):
                pass
            return pieces
        seen = self._held.lstrip()
        if self._named is None and seen and seen[0] not in "{[" and not PYTHON_TAG.startswith(seen[: len(PYTHON_TAG)]):
            self._is_content = True
        if self._is_content and self._held:
            pieces.append(self._held)
            self._held = ""
        return pieces

    def finish(self) -> list[Piece]:
        """What was held back, as calls if it is whole, else as content."""
        held, self._held = self._held, ""
        if not held:
            return []
        return [held] if self._format.opens else self._taken(held, held)

    def _advance(self, pieces: list[Piece]) -> bool:
        opens, closes = self._format.opens, self._format.closes
        start = self._held.find(opens)
        free = self._held[: len(self._held) - held_back(self._held, opens) if start < 0 else start].rstrip()
        if free:
            pieces.append(free)
            self._held = self._held[len(free) :]
            start -= len(free)
        if start < 0:
            return False
        # whitespace before a call is layout, if it is one
        inner = at = start + len(opens)
        while (end := self._held.find(closes, at)) >= 0 and self._format.is_open(self._held[inner:end]):
            at = end + 1
        if end < 0:
            return False
        whole = self._held[: end + len(closes)]
        self._held = self._held[len(whole) :]
        pieces += self._taken(whole, whole[inner:end])
        return True

    def _taken(self, whole: str, inner: str) -> list[Piece]:
        if self._named is None:
            calls = self._format.parse(inner, self._schemas)
        else:
            calls = [Call(self._named, inner)] if is_table(_loads(inner)) else None
        if not calls or (not self._parallel and self._calls + len(calls) > 1):
            return [whole]
        self._calls += len(calls)
        return [*calls]


def format_of(template: str) -> FormatName:
    """The format that a chat template teaches its model."""
    if "<function=" in template:
        return "qwen3_coder"
    if "<TOOLCALL>" in template:
        return "nemotron"
    if "<tool_call>" in template:
        return "hermes"
    return "llama_json" if PYTHON_TAG in template or '"parameters": dictionary' in template else "hermes"


def calls_schema(tools: Sequence[Mapping[str, Any]], parallel: bool) -> dict[str, Any]:
    """JSON schema of a list of calls of `tools`, at least one."""
    kinds = [
        {
            "type": "object",
            "properties": {"name": {"const": t["name"]}, "parameters": t.get("parameters") or {"type": "object"}},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for t in tools
    ]
    bound = {} if parallel else {"maxItems": 1}
    return {"type": "array", "minItems": 1, **bound, "items": kinds[0] if len(kinds) == 1 else {"anyOf": kinds}}


def _json_calls(text: str, schemas: Schemas) -> list[Call] | None:
    text = text.strip().removeprefix(PYTHON_TAG).strip()
    data = _loads(text)
    # Llama writes several calls with semicolons between
    if data is None and text.startswith("{"):
        data = _loads("[" + re.sub(r"\}\s*;\s*\{", "},{", text) + "]")
    try:
        written = _WRITTEN.validate_python(data if is_list(data) else [data])
    except ValidationError:
        return None
    return [Call(call.name, json.dumps(call.arguments, ensure_ascii=False)) for call in written]


def _xml_call(text: str, schemas: Schemas) -> list[Call] | None:
    function = _FUNCTION.fullmatch(text)
    if function is None:
        return None
    name, inner = function[1].strip(), function[2]
    declared: Mapping[str, Any] = schemas.get(name, {}).get("properties") or {}
    arguments: dict[str, Any] = {}
    at = 0
    for match in _PARAMETER.finditer(inner):
        if inner[at : match.start()].strip():
            return None
        key = match[1].strip()
        value = match[2].removeprefix("\n").removesuffix("\n")
        arguments[key] = _typed(value, declared.get(key))
        at = match.end()
    return None if inner[at:].strip() else [Call(name, json.dumps(arguments, ensure_ascii=False))]


def _typed(value: str, schema: object) -> Any:
    """A value as its schema has it; a string where that says nothing."""
    if not is_table(schema):
        return value
    kinds, is_null = schema.get("type"), value.strip() == "null"
    if kinds == "string" or (is_list(kinds) and "string" in kinds and not is_null):
        return value
    if kinds is None and not {"anyOf", "oneOf", "enum", "const", "$ref"} & schema.keys():
        return value
    parsed = _loads(value)
    return value if parsed is None and not is_null else parsed


def _in_string(text: str) -> bool:
    """Whether JSON stops inside a string."""
    return len(re.sub(r"\\.", "", text, flags=re.DOTALL).split('"')) % 2 == 0


def _before_function_end(text: str) -> bool:
    return "<function=" in text and not text.rstrip().endswith("</function>")


def _loads(text: str) -> Any:
    """The value of a JSON text, None if it is none; half characters and numbers without end are not JSON."""
    try:
        return from_json(text, allow_inf_nan=False)
    except ValueError:
        return None


FORMATS: dict[FormatName, Format] = {
    "hermes": Format("<tool_call>", "</tool_call>", _json_calls, _in_string),
    "qwen3_coder": Format("<tool_call>", "</tool_call>", _xml_call, _before_function_end),
    "nemotron": Format("<TOOLCALL>", "</TOOLCALL>", _json_calls, _in_string),
    "llama_json": Format("", "", _json_calls, _in_string),
}
