"""What a load consists of: conversations of one or several requests, random or from a file."""

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from alloy.errors import DataError, RequestError

Dataset = Literal["random", "sharegpt", "prefix-repetition", "multi-turn", "jsonl"]
# these make their own text: the length of their answers is meant, too
SYNTHETIC = ("random", "prefix-repetition", "multi-turn")
# one token each in most vocabularies, and all of one length for those that count bytes
_TEXT = (
    "able also area army away baby back ball bank base bear beat been best bird blue boat body book born both call came "
    "card care case city club cold come cool cost dark data date days dead deal deep door down draw drop each east easy "
    "edge else even ever face fact fair fall farm fast fear feel feet fell file fill film find fine fire firm fish five "
    "flat flow food foot form four free from full fund game gave girl give glad goal goes gold gone good gray grew grow "
    "hair half hall hand hard have head hear heat held help here high hill hold home hope hour huge idea inch into iron "
    "item join jump just keep kept kind king knew know lady lake land last late lead left less life like line list live"
)
_WORDS = _TEXT.split()


@dataclass(frozen=True)
class Turn:
    """One request of a conversation: the messages it adds, and its longest answer in tokens."""

    messages: list[dict[str, Any]]
    max_tokens: int


@dataclass(frozen=True)
class Talk:
    """Requests that follow each other; each carries the earlier ones with their answers."""

    turns: list[Turn] = field(default_factory=list[Turn])


@dataclass(frozen=True)
class Lengths:
    """Sizes of synthetic requests, in tokens; `spread` is the share by which each may be shorter or longer."""

    input: int
    # None: as recorded in the file
    output: int | None
    spread: float = 0.0

    def draw(self, mean: int, rng: random.Random) -> int:
        """A length, uniform around `mean`."""
        low, high = math.ceil(mean * (1 - self.spread)), math.floor(mean * (1 + self.spread))
        return max(1, rng.randint(min(low, high), high))


@dataclass(frozen=True)
class Shape:
    """What only some datasets look at."""

    path: Path | None = None
    prefix_len: int = 256
    num_prefixes: int = 10
    turns: int = 4


def make_talks(
    dataset: Dataset, count: int, lengths: Lengths, shape: Shape, words_in: Callable[[int], int], seed: int
) -> list[Talk]:
    """Conversations with `count` requests in all.

    Args:
        dataset: where text comes from
        count: number of requests
        lengths: of prompts and answers
        shape: file, prefixes, turns
        words_in: number of words that make a prompt of so many tokens
        seed: the same seed gives the same text, lengths and order
    """
    rng = random.Random(seed)
    if dataset in ("sharegpt", "jsonl"):
        if shape.path is None:
            raise RequestError(f"--dataset {dataset} reads a file; name it with --dataset-path")
        read = _read_sharegpt if dataset == "sharegpt" else _read_jsonl
        found = read(shape.path, lengths.output)
        rng.shuffle(found)
        return [Talk([found[i % len(found)]]) for i in range(count)]

    def text(tokens: int) -> str:
        return " ".join(rng.choices(_WORDS, k=max(1, words_in(tokens))))

    def turn(prefix: str = "") -> Turn:
        words = text(lengths.draw(lengths.input, rng))
        content = f"{prefix} {words}" if prefix else words
        return Turn([{"role": "user", "content": content}], lengths.draw(lengths.output or 128, rng))

    if dataset == "multi-turn":
        sizes = [min(shape.turns, count - start) for start in range(0, count, shape.turns)]
        return [Talk([turn() for _ in range(size)]) for size in sizes]
    prefixes = [text(shape.prefix_len) for _ in range(shape.num_prefixes)] if dataset == "prefix-repetition" else [""]
    talks = [Talk([turn(prefixes[i % len(prefixes)])]) for i in range(count)]
    rng.shuffle(talks)
    return talks


def transcript(messages: Sequence[dict[str, Any]]) -> str:
    """Messages as one text, for the completions endpoint."""
    return "\n".join(str(message["content"]) for message in messages)


def _read_sharegpt(path: Path, output_len: int | None) -> list[Turn]:
    """The first question of every conversation; its answer may be as long as the recorded one, at 4 letters a token."""
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    turns: list[Turn] = []
    for entry in data if isinstance(data, list) else []:
        said = entry.get("conversations") if isinstance(entry, dict) else None
        if not isinstance(said, list) or len(said) < 2 or not all(isinstance(part, dict) for part in said[:2]):
            continue
        question, answer = str(said[0].get("value", "")), str(said[1].get("value", ""))
        if question.strip() and answer.strip():
            length = output_len or max(4, len(answer) // 4)
            turns.append(Turn([{"role": "user", "content": question}], length))
    if not turns:
        raise DataError(
            f'{path} has no conversations: a list of {{"conversations": [{{"value": question}}, {{"value": answer}}]}} is read'
        )
    return turns


def _read_jsonl(path: Path, output_len: int | None) -> list[Turn]:
    """Lines with "prompt" or "messages", and "max_tokens" where a line has its own."""
    turns: list[Turn] = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: is not JSON: {error}") from error
        if not isinstance(data, dict) or ("prompt" in data) == ("messages" in data):
            raise DataError(f'{path}:{number}: needs one of "prompt" and "messages"')
        length = data.get("max_tokens", output_len or 128)
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise DataError(f"{path}:{number}: max_tokens = {json.dumps(length)} must be a whole number from 1")
        messages = data["messages"] if "messages" in data else [{"role": "user", "content": data["prompt"]}]
        is_chat = isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)
        if not is_chat or not all(isinstance(m.get("content"), str) for m in messages):
            raise DataError(f"{path}:{number}: prompt must be a text, messages a list of objects whose content is text")
        turns.append(Turn(messages, length))
    if not turns:
        raise DataError(f"{path} has no prompts")
    return turns
