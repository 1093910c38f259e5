"""Grammars that an answer must meet: which tokens may come next, and when the answer may or must end.

Parsing is llguidance's. A grammar is compiled once per text; every sequence then walks its own copy, which sees accepted
tokens only and looks ahead over the drafts of a verify step. Only whole tokens of the grammar and, where the text may end,
the sequence's stop tokens are allowed, so whatever the model's weights are, an answer that ended meets the grammar.

On one CPU core, median of the sampler's step for one row: 0.07 to 0.2 ms more at a vocabulary of 2,000 tokens, 0.6 to
0.7 ms at 130,000, of which finding the mask is about 0.01 and 0.03 to 0.1 ms on average. Compiling a small schema takes 2 to
7 ms, after 1.4 to 3 s once for a tokenizer of 130,000.

Differs from JSON Schema: properties come in the order of the schema; between tokens there is one line break with its
indentation or a run of spaces at most, because a model may otherwise write blanks without end. Of llguidance 1.9, two errors
that let invalid answers through are gone around: `_close_bounds` and `_without_nul`.
"""

import json
import math
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Set
from collections.abc import Sequence as Items
from copy import copy
from dataclasses import dataclass
from threading import Lock, Thread
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, get_args
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from alloy.core.toml import is_list, is_table
from alloy.engine.reasoning import ThinkingMarkers, Thought
from alloy.errors import RequestError

if TYPE_CHECKING:
    from alloy.engine.codec import Codec

Kind = Literal["json_object", "json_schema", "regex", "choice", "lark"]
# bit masks: one bit a token, (words,) uint32
Words = NDArray[np.uint32]

MAX_BYTES = 256 * 1024
MAX_NESTING = 64
# how near a number comes to a whole number that it must not reach
GAP = 1e-9
COMPILE_S = 10.0
CACHED = 128
WHITESPACE = r"\r?\n[ \t]{0,128}|[ \t]{1,128}"
# a token that no text holds: what llguidance takes for the end of the answer
END = "<|end of grammar|>"
# llguidance follows what a grammar forces, for which a text that is forced for ever has no end
UNFORCED = '%llguidance {"no_forcing": true}'
# keywords whose value is schemas by name
DEFINED = ("$defs", "definitions")
NAMED = ("properties", "patternProperties", *DEFINED)
# keywords whose value is data
DATA = ("const", "enum", "default", "examples")
SCALARS = ("string", "number", "integer", "boolean", "null")

# keywords, and what llguidance's message holds when it is about their value
BLAMED = {"format": "format: ", "pattern": "regex", "type": "type: ", "$ref": ""}

# classes of a regular expression, and what must not be taken for one
CLASSES = re.compile(r"\\[pP](?:\{[^}]*\}|.)|\\.|\[\^?\]?(?:\[:\^?\w+:\]|\\.|[^\]\\\[])*\]|\[", re.DOTALL)

Path = tuple[str, ...]


@dataclass(frozen=True)
class Grammar:
    """What an answer must be.

    Attributes:
        kind: `json_object`: any JSON object, `text` is not read; `json_schema`: JSON that the schema admits; `regex`: text
            that the whole expression matches, in the syntax of Rust's regex without lookaround; `choice`: one of a JSON
            list of texts; `lark`: llguidance's Lark dialect
        text: the grammar itself
    """

    kind: Kind
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise RequestError(f'grammar kind = "{self.kind}" is unknown; use one of {", ".join(get_args(Kind))}')
        if not isinstance(self.text, str):  # pyright: ignore[reportUnnecessaryIsInstance]  the caller's JSON
            raise RequestError(f"{self.kind} must be a text, not {type(self.text).__name__}")
        size = len(self.text.encode("utf-8", "surrogatepass"))
        if size > MAX_BYTES:
            raise RequestError(f"{self.kind} has {size:,} bytes; at most {MAX_BYTES:,} are allowed")


@dataclass(frozen=True)
class CompiledGrammar:
    """A grammar bound to a vocabulary; shared by the sequences that use it.

    Attributes:
        matcher: llguidance's, at the start of the text
        words: uint32 words of a mask, at least the vocabulary's
        end: id of `END`
        markers: what opens and closes a thought
        spills: by what is held of the marker that closes it, tokens that would do so and begin the answer
    """

    matcher: Any
    words: int
    end: int
    markers: ThinkingMarkers | None
    spills: Mapping[str, Words]

    def start(self, prompt: Items[int], ends: frozenset[int], tokens: Items[int] = ()) -> "GrammarState":
        """The state of a sequence after `tokens`, which were accepted earlier.

        Args:
            prompt: ids; where its last thought is open, the grammar begins after the thought
            ends: ids that end the sequence
            tokens: what the sequence generated so far, without an end
        """
        state = GrammarState(self, prompt, ends)
        for token in tokens:
            state.advance(token)
        return state


class GrammarState:
    """Where one sequence is in its grammar."""

    def __init__(self, grammar: CompiledGrammar, prompt: Items[int], ends: frozenset[int]) -> None:
        self.words = grammar.words
        self._matcher = grammar.matcher.deep_copy()
        self._spills = grammar.spills
        markers = grammar.markers
        self._thought = Thought(markers, prompt) if markers is not None else None
        # some tokenizers have markers as plain tokens, which a JSON string could hold
        control = {grammar.end, *ends, *(markers.ids if markers is not None else ())}
        self._control = _bits(control, self.words)
        self._end_bits = _bits(ends, self.words)

    @property
    def may_stop(self) -> bool:
        """Whether the text so far meets the grammar."""
        return (self._thought is None or not self._thought.inside) and self._matcher.is_accepting()

    @property
    def done(self) -> bool:
        """Whether the text meets the grammar and nothing can follow."""
        return self.may_stop and self._matcher.is_stopped()

    def advance(self, token: int) -> bool:
        """Take the next token, which is not an end; False, with nothing changed, when the grammar forbids it."""
        if self._thought is not None and self._thought.inside:
            self._thought.push(token)
            return True
        return self._matcher.try_consume_tokens([token]) == 1

    def masks(self, out: NDArray[np.uint32], drafts: Items[int] = ()) -> None:
        """Write which tokens may come at each position; the state stays where it is.

        Args:
            out: (positions, words)
            drafts: the tokens between the positions; after one that cannot be accepted every token is allowed
        """
        thought, taken = copy(self._thought), 0
        for j in range(len(out)):
            if thought is not None and thought.inside:
                # an end inside the thought would leave the answer out
                out[j] = ~(self._end_bits | self._spills.get(thought.held, 0))
            else:
                self._fill(out[j])
            if j == len(drafts):
                break
            token = drafts[j]
            if thought is not None and thought.inside:
                thought.push(token)
                is_open = True
            else:
                is_open = self._matcher.try_consume_tokens([token]) == 1
                taken += is_open
                is_open = is_open and not self._matcher.is_stopped()
            if not is_open:
                out[j + 1 :] = 0xFFFFFFFF
                break
        if taken:
            self._matcher.rollback(taken)

    def _fill(self, row: Words) -> None:
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        row &= ~self._control
        if self._matcher.is_accepting():
            row |= self._end_bits


def compile_grammar(grammar: Grammar, codec: "Codec", vocab: int) -> CompiledGrammar:
    """Compile a grammar, or find it among those compiled before. May take seconds; any thread may call it.

    Args:
        grammar: what the answer must be
        codec: the model's tokenizer
        vocab: width of the model's logits
    """
    compiler = codec.grammars.get(vocab)
    if not isinstance(compiler, _Compiler):
        # two threads may both come here: the later one's is kept
        compiler = codec.grammars[vocab] = _Compiler(codec, vocab)
    return compiler.compile(grammar)


class _Compiler:
    """llguidance's view of one tokenizer, and the grammars compiled for it."""

    def __init__(self, codec: "Codec", vocab: int) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise RequestError(
                'a grammar needs llguidance, which is not installed: pip install "alloy-lm[serve]"'
            ) from error
        self._library: Any = llguidance
        serialized, self._end = codec.serialize(END)
        width = max(vocab, self._end + 1)
        try:
            self._tokenizer = llguidance.LLTokenizer(serialized, n_vocab=width, eos_token=self._end)
        except ValueError as error:
            raise RequestError(f"grammars do not work with the model's tokenizer: {_line(str(error))}") from error
        self._words = (width + 31) // 32
        self._markers = codec.markers
        spills = self._markers.spills(vocab) if self._markers is not None else {}
        self._spills = {held: _bits(ids, self._words) for held, ids in spills.items()}
        self._lock = Lock()
        self._cache: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        with self._lock:
            if grammar in self._cache:
                self._cache.move_to_end(grammar)
                return self._cache[grammar]
        results: list[CompiledGrammar | RequestError] = []
        worker = Thread(target=lambda: results.append(self._try(grammar)), daemon=True)
        worker.start()
        worker.join(COMPILE_S)
        if not results:
            raise RequestError(f"{grammar.kind} takes more than {COMPILE_S:g} s to compile; make it simpler")
        result = results[0]
        if isinstance(result, RequestError):
            raise result
        with self._lock:
            self._cache[grammar] = result
            while len(self._cache) > CACHED:
                self._cache.popitem(last=False)
        return result

    def _try(self, grammar: Grammar) -> CompiledGrammar | RequestError:
        try:
            return self._build(grammar)
        except RequestError as error:
            return error
        except ValueError as error:
            # such as text that is not Unicode
            return RequestError(f"{grammar.kind} is not supported: {_line(str(error))}")

    def _build(self, grammar: Grammar) -> CompiledGrammar:
        make = self._library.LLMatcher
        schema: Any = None
        if grammar.kind in ("json_object", "json_schema"):
            schema = {"type": "object"} if grammar.kind == "json_object" else _parse_schema(grammar.text)
            # only a dict can carry options; True admits anything and False nothing
            rules: dict[str, Any] = dict(schema) if is_table(schema) else {} if schema else {"enum": []}
            rules.pop("x-guidance", None)
            overrides = {"whitespace_pattern": WHITESPACE}
            text = make.grammar_from_json_schema(json.dumps(rules), overrides=overrides)
        elif grammar.kind == "choice":
            text = make.grammar_from_lark("start: " + " | ".join(_choices(grammar.text)))
        elif grammar.kind == "regex":
            text = make.grammar_from_regex(grammar.text)
        else:
            text = make.grammar_from_lark(f"{grammar.text}\n{UNFORCED}")
        matcher = make(self._tokenizer, text, log_level=0)
        if matcher.is_error():
            raise _refusal(grammar.kind, schema, matcher.get_error())
        mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint32)
        if not np.any(mask & ~_bits({self._end}, len(mask))):
            rest = "admits the empty answer alone" if matcher.is_accepting() else "cannot be met by any answer"
            raise RequestError(f"{grammar.kind} {rest}; change it")
        return CompiledGrammar(matcher, self._words, self._end, self._markers, self._spills)


def _bits(ids: Iterable[int], words: int) -> Words:
    """A mask of `ids`; those beyond it are left out."""
    mask = np.zeros(words, dtype=np.uint32)
    for i in ids:
        if i < words * 32:
            mask[i >> 5] |= np.uint32(1 << (i & 31))
    return mask


def _line(message: str) -> str:
    """The lines of a message as one."""
    return " ".join(part.strip() for part in message.splitlines() if part.strip(" ^\t"))


def _choices(text: str) -> list[str]:
    """The texts of a choice as Lark literals."""
    try:
        listed: Any = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise RequestError(f"choice is not a JSON list of texts: {error}") from error
    if not is_list(listed) or not listed:
        raise RequestError("choice must be a JSON list of at least one text")
    for i, item in enumerate(listed):
        if not isinstance(item, str) or not item:
            raise RequestError(f"choice[{i}] = {json.dumps(item)} is not a text of at least one character")
    return [json.dumps(item, ensure_ascii=False) for item in listed]


def _parse_schema(text: str) -> Any:
    """The schema of a text, checked as far as llguidance does not."""
    depth = deepest = 0
    for mark in re.findall(r'"(?:[^"\\]|\\.)*"?|[\[\]{}]', text):
        depth += 1 if mark in "[{" else -1 if mark in "]}" else 0
        deepest = max(deepest, depth)
    if deepest > MAX_NESTING:
        raise RequestError(f"json_schema nests {deepest} levels deep; at most {MAX_NESTING} are allowed")
    try:
        schema: Any = json.loads(text, parse_float=_finite, parse_constant=_finite)
    except json.JSONDecodeError as error:
        raise RequestError(f"json_schema is not JSON: {error}") from error
    if not is_table(schema) and not isinstance(schema, bool):
        raise RequestError("json_schema must be an object, or true or false")
    for path, part in _schemas(schema):
        least = part.get("minProperties", 0)
        if isinstance(least, int) and least > max(1, len(_items(part, "required"))):
            raise RequestError(
                f"json_schema at {_place(path)}: minProperties = {least} cannot be held, since free keys may repeat; "
                "name the keys in required"
            )
        if part.get("type") != "integer":
            _close_bounds(part)
        if isinstance(part.get("pattern"), str):
            part["pattern"] = _without_nul(part["pattern"], _place((*path, "pattern")))
        if is_table(keys := part.get("patternProperties")):
            place = _place((*path, "patternProperties"))
            part["patternProperties"] = {_without_nul(k, place): v for k, v in keys.items()}
    if not _can_end(schema):
        raise RequestError(
            "json_schema cannot be met by any answer: what it requires is false or contains itself without end"
        )
    return schema


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise RequestError(f"json_schema has the number {number}, which is not finite")
    return value


def _close_bounds(part: dict[str, Any]) -> None:
    """Replace open bounds at whole numbers, which llguidance 1.9 lets through (0 for over 0 and up to 0.5)."""
    for key, closed, step, pick in (
        ("exclusiveMinimum", "minimum", GAP, max),
        ("exclusiveMaximum", "maximum", -GAP, min),
    ):
        bound, other = part.get(key), part.get(closed)
        if isinstance(bound, int | float) and not isinstance(bound, bool) and bound == int(bound) and abs(bound) < 1e6:
            del part[key]
            part[closed] = pick(bound + step, other) if isinstance(other, int | float) else bound + step


def _without_nul(pattern: str, place: str) -> str:
    """Take U+0000 out of every class: of a class with all control characters llguidance 1.9 also lets \\" and \\\\ through."""

    def change(found: re.Match[str]) -> str:
        token = found[0]
        if token == "[":
            raise RequestError(
                f"json_schema at {place}: brackets within brackets are not supported; write \\[ for the sign"
            )
        return f"[{token}--\\x00]" if len(token) > 1 and (token[0] == "[" or token[1] in "pP") else token

    return CLASSES.sub(change, pattern)


def _schemas(part: Any, path: Path = (), is_named: bool = False) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every object of a schema that a reference may name, with its path; values that are data are left out."""
    if is_list(part):
        for i, item in enumerate(part):
            yield from _schemas(item, (*path, str(i)))
    elif is_table(part):
        if not is_named:
            yield path, part
        for key, value in part.items():
            # the names of properties and definitions are no keywords
            if is_named or key not in DATA:
                yield from _schemas(value, (*path, key), key in NAMED and not is_named)


def _place(path: Path) -> str:
    """A path as people write it: $.properties.a.items."""
    return ".".join(("$", *path))


def _refusal(kind: Kind, schema: Any, message: str) -> RequestError:
    """What to say of llguidance's message; of a schema, with the path of the keyword it is about."""
    line = _line(message)
    reason = line.rsplit("error: ", 1)[-1]
    keys = re.match(r"Unimplemented keys: (\[.*\])", line)
    names: set[str] = set(json.loads(keys[1])) if keys else set()
    # a definition is to blame only where no other part is
    parts = sorted(_schemas(schema), key=lambda found: any(key in DEFINED for key in found[0]))
    for path, part in parts:
        for key, value in part.items():
            place = f"{kind} at {_place((*path, key))}"
            if key in names:
                return RequestError(f'{place}: the keyword "{key}" is not supported; leave it out')
            if key == "oneOf" and line.startswith("oneOf"):
                return RequestError(f"{place}: oneOf is supported only where its parts cannot overlap; use anyOf")
            if key in BLAMED and BLAMED[key] in line and isinstance(value, str) and value in line:
                return RequestError(f"{place} is not supported: {reason}")
    return RequestError(f"{kind} is not supported: {reason}")


def _can_end(schema: Any) -> bool:
    """Whether a schema admits a finite value: references may go round, but not through required parts alone."""
    names = {part["$ref"] for _, part in _schemas(schema) if isinstance(part.get("$ref"), str)}
    # references that are known to end
    finite: set[str] = set()
    deadline = monotonic() + COMPILE_S
    while monotonic() < deadline:
        found = {name for name in names - finite if _ends(_target(schema, name), finite)}
        if not found:
            break
        finite |= found
    return _ends(schema, finite)


def _ends(schema: Any, finite: Set[str]) -> bool:
    """Whether some finite value may meet `schema`; what cannot be decided counts as yes."""
    if not is_table(schema):
        return schema is not False
    if "const" in schema or "enum" in schema:
        return True

    def every(parts: Iterable[Any]) -> bool:
        return all(_ends(part, finite) for part in parts)

    options = [listed for key in ("anyOf", "oneOf") if (listed := _items(schema, key))]
    if (
        (isinstance(schema.get("$ref"), str) and schema["$ref"] not in finite)
        or not every(_items(schema, "allOf"))
        or not all(any(_ends(part, finite) for part in listed) for listed in options)
    ):
        return False
    kinds = schema.get("type", "null")
    kinds = kinds if is_list(kinds) else [kinds]
    if any(kind in SCALARS for kind in kinds):
        return True
    if "object" in kinds:
        named, rest = schema.get("properties"), schema.get("additionalProperties", True)
        rest = True if schema.get("patternProperties") else rest
        required = [name for name in _items(schema, "required") if isinstance(name, str)]
        if every(named.get(name, rest) if is_table(named) else rest for name in required):
            return True
    least, first = schema.get("minItems", 0), _items(schema, "prefixItems")
    if "array" not in kinds or not isinstance(least, int):
        return "array" in kinds
    return every(first[:least]) and (least <= len(first) or every([schema.get("items", True)]))


def _target(schema: Any, name: str) -> Any:
    """What a reference into the same schema names; True for any other."""
    if not name.startswith("#") or (len(name) > 1 and name[1] != "/"):
        return True
    found: Any = schema
    for step in unquote(name[2:]).split("/") if len(name) > 1 else ():
        key = step.replace("~1", "/").replace("~0", "~")
        if is_table(found) and key in found:
            found = found[key]
        elif is_list(found) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        else:
            return True
    return found


def _items(part: Mapping[str, Any], key: str) -> list[Any]:
    value = part.get(key)
    return value if is_list(value) else []
