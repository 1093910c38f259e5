"""Answers under a grammar: whatever the weights, the sampling and the drafts, a text that ended meets it."""

import json
import re
from dataclasses import replace

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

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

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
                "value": {"anyOf": [{"type": "boolean"}, {"type": "number", "minimum": -3, "maximum": 3}, {"const": "x"}]},
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
    "both": {"allOf": [{"properties": {"a": {"type": "integer"}}}, {"required": ["a"]}], "type": "object", "maxProperties": 1},
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
