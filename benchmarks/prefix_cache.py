"""What the prefix cache finds, what it costs where there is nothing to find, and what it keeps where room is short.

    python benchmarks/prefix_cache.py --out benchmarks/results/prefix_cache.json

resend: prompts of every length from 2 to 600, and some up to 4,096, sent twice to a tiny hybrid, and to one that drafts: the
second time all tokens but the last must be found, or the command fails (1).

nothing to reuse: random prompts with the cache on and off, taken in turn, with a cache that is full, so that every request
evicts; the median of the pairs' ratios, of process time and of wall time, and the pairs' quartiles.

chats: 128 conversations of 12 turns (20 to 200 tokens of Python's language reference, answers of 20 to 150) with a tiny
hybrid; so many are active at a time, and each of those sends its next turn when it has its answer, so that the others' turns
are between. "keeps": the template keeps what was said; "drops": every answer begins with a thought of 20 to 150 tokens that
the next prompt does not have. Room: the share of all tokens of all conversations that blocks are there for, and slots for
states as the engine plans them for so many blocks. Served: prompt tokens that were found, as a share of those that are found
where nothing is ever evicted. The command fails if that is below 0.90 with 16 active, room for half, and a template that keeps.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alloy.bench.tiny import HYBRID, SPECIAL, build
from alloy.bench.worker import machine
from alloy.engine.core import LLM
from alloy.engine.pool import PLAN_SNAPSHOTS, PLAN_TOKENS
from alloy.engine.request import Request, SamplingParams
from alloy.models import registry, sizes
from alloy.models.base import CausalLM
from alloy.models.configs import HybridConfig
from alloy.models.paged import blocks_of
from alloy.ops.attention import BLOCK

CHATS, TURNS = 128, 12
# of the engine that serves them
ROWS = 16
SCENES = [(16, 0.5), (32, 0.5), (64, 0.5), (16, 0.25), (32, 0.25)]
TARGET, MOST_COST = 0.90, 0.03
START, END = (256 + SPECIAL.index(name) for name in ("<|im_start|>", "<|im_end|>"))
# about 48 million parameters (benchmarks/cpu_hybrid.py)
DENSE = {
    "vocab": 8192, "hidden": 512, "num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "ssm_heads": 16, "ssm_head_dim": 64,
    "ssm_state": 128, "ssm_groups": 8, "pattern": "M-M-M-M*-M-M-M*-M-", "ffn": 2048,
}  # fmt: skip


def greedy(length: int) -> SamplingParams:
    """The likeliest tokens, so many."""
    return SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)


def resend(lengths: list[int]) -> list[dict[str, Any]]:
    """Every prompt twice: by model how many lengths, and those at which something else than all but one was found."""
    found: list[dict[str, Any]] = []
    for name, speculate in (("hybrid", 0), ("mtp", 2)):
        llm, r = LLM(build(name), max_model_len=4160, speculate=speculate), random.Random(0)
        wrong: list[tuple[int, int]] = []
        for length in lengths:
            prompt = [r.randrange(256) for _ in range(length)]
            first, second = (llm.generate([prompt], greedy(2))[0] for _ in range(2))
            same = first.completions[0].token_ids == second.completions[0].token_ids
            if second.cached_tokens != length - 1 or not same:
                wrong.append((length, second.cached_tokens))
        found.append({"model": name, "drafts": speculate, "lengths": len(lengths), "wrong": wrong})
        print(
            f"resend, {name}, {speculate} drafts: {len(lengths)} lengths from {lengths[0]} to {lengths[-1]}, wrong: {wrong}"
        )
    return found


def cost(
    name: str, model: CausalLM, memory: float, shape: tuple[int, int, int], pairs: int, drawn: bool
) -> dict[str, Any]:
    """Cache on beside off on prompts that nobody sent before; shape: requests, prompt and answer tokens of a run; drawn: answers of
    half to one and a half times that length, so that sequences come and go, else all end together."""
    requests, prompt, answer = shape
    sides = {on: LLM(model, max_model_len=1024, max_seqs=8, prefix_cache=on, memory=memory) for on in (True, False)}
    r, vocab = random.Random(1), model.config.vocab
    # until every request evicts: an ended one leaves two states
    slots = sides[True].engine().gauges().slots
    for _ in range(0, slots, 16):
        sides[True].generate([[r.randrange(vocab) for _ in range(3)] for _ in range(8)], greedy(1))
    ratios: dict[str, list[float]] = {"process": [], "wall": []}
    for i in range(pairs + 1):
        prompts = [[r.randrange(vocab) for _ in range(prompt)] for _ in range(requests)]
        lengths = [greedy(r.randint(answer // 2, 3 * answer // 2) if drawn else answer) for _ in prompts]
        taken: dict[bool, tuple[float, float]] = {}
        for on in (True, False) if i % 2 else (False, True):
            before = time.process_time(), time.perf_counter()
            sides[on].generate(prompts, lengths)
            taken[on] = time.process_time() - before[0], time.perf_counter() - before[1]
        if i:
            for clock, kind in enumerate(ratios):
                ratios[kind].append(taken[True][clock] / taken[False][clock])
    held = sides[True].engine().gauges()
    result: dict[str, Any] = {
        "model": name, "parameters": sum(p.numel() for p in model.parameters()), "pairs": pairs, "requests": requests,
        "prompt": prompt, "answer": answer, "lengths": "drawn" if drawn else "all the same", "snapshots": held.slots_cached, "slots_free": held.slots_free,
    }  # fmt: skip
    for kind, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        result[f"{kind}_time"] = {"median": middle, "quartiles": [low, high]}
    own = result["process_time"]
    print(
        f"nothing to reuse, {name}, lengths {result['lengths']}: time with the cache over time without {own['median']:.3f} "
        f"({own['quartiles'][0]:.3f} .. {own['quartiles'][1]:.3f}; of the wall {result['wall_time']['median']:.3f}), "
        f"{pairs} pairs of {requests} requests, {prompt} in, {answer} out on average, {held.slots_cached} snapshots held"
    )
    return result


@dataclass
class Chat:
    """A conversation as tokens.

    Attributes:
        turns: user's tokens, thought tokens and answer tokens of each
    """

    turns: list[tuple[list[int], int, int]]
    history: list[int]

    def prompt(self, turn: int) -> tuple[list[int], int]:
        """What is sent, and where the last user turn ends."""
        asked = [*self.history, START, *b"user\n", *self.turns[turn][0], END, 10]
        return [*asked, START, *b"assistant\n"], len(asked)

    def take(self, turn: int, prompt: list[int], answer: list[int]) -> None:
        """Let the template lay out what was answered, without the thought."""
        self.history = [*prompt, *answer[self.turns[turn][1] :], END, 10]


def chats(count: int, turns: int, thinks: bool, text: bytes) -> list[Chat]:
    """Conversations, the same every time."""
    made: list[Chat] = []
    for i in range(count):
        r = random.Random(i)
        listed: list[tuple[list[int], int, int]] = []
        for _ in range(turns):
            at, size = r.randrange(len(text) - 200), r.randint(20, 200)
            listed.append((list(text[at : at + size]), r.randint(20, 150) if thinks else 0, r.randint(20, 150)))
        made.append(Chat(listed, []))
    return made


def talk(llm: LLM, talks: list[Chat], active: int) -> tuple[int, int]:
    """Hold all conversations, `active` at a time: tokens of prompts, and those that were found."""
    engine, waiting = llm.engine(), deque(talks)
    open_: dict[str, tuple[Chat, int, list[int], list[int]]] = {}
    number = asked = found = 0

    def send(chat: Chat, turn: int) -> None:
        nonlocal number, asked
        prompt, end = chat.prompt(turn)
        length = chat.turns[turn][1] + chat.turns[turn][2]
        open_[str(number)] = chat, turn, prompt, []
        engine.add(Request(id=str(number), token_ids=prompt, params=greedy(length), keep_at=[end]))
        number, asked = number + 1, asked + len(prompt)

    while waiting or open_:
        while waiting and len(open_) < active:
            send(waiting.popleft(), 0)
        for news in engine.step():
            chat, turn, prompt, answer = open_[news.id]
            answer += news.completions[0].token_ids
            if not news.finished:
                continue
            del open_[news.id]
            found += news.cached_tokens
            chat.take(turn, prompt, answer)
            if turn + 1 < len(chat.turns):
                send(chat, turn + 1)
    return asked, found


def room_for(config: HybridConfig, blocks: int, longest: int) -> float:
    """GiB with which the engine plans so many blocks, beside slots for running sequences and snapshots."""
    block = sizes.kv_bytes(config, 1, BLOCK, "float32")
    slot = sizes.state_bytes(config, 1, "float32") + sizes.conv_bytes(config, 1, "float32")
    snapshots = PLAN_SNAPSHOTS * blocks // blocks_of(min(longest, PLAN_TOKENS))
    return (blocks * block + (ROWS + snapshots) * slot) / sizes.GIB


def scenes(count: int, turns: int, which: list[tuple[int, float]], text: bytes) -> Iterator[dict[str, Any]]:
    """Tokens served from a bounded cache beside those from one that never evicts."""
    config = HybridConfig.model_validate({**HYBRID, "pattern": "M*", "max_positions": 8192})
    model = registry.build(config)
    model.init_weights(0)
    model.eval()
    for thinks in (False, True):
        talks = chats(count, turns, thinks, text)
        longest = max(sum(len(user) + thought + said + 40 for user, thought, said in c.turns) for c in talks)
        options: dict[str, Any] = {"max_model_len": longest, "max_seqs": ROWS, "speculate": 0}
        free, slots = LLM(model, **options), 3 * count * turns + ROWS
        # three states a turn and every token: nothing has to go
        free._new_pool = lambda n=slots, most=longest: model.new_paged_cache(n, 2 * count * blocks_of(most), most)
        asked, unbounded = talk(free, talks, which[0][0])
        tokens = sum(len(chat.history) for chat in talks)
        del free
        for active, share in which:
            blocks = int(share * tokens) // BLOCK
            bound = LLM(model, **options, memory=room_for(config, blocks, longest))
            _, served = talk(bound, chats(count, turns, thinks, text), active)
            held = bound.engine().gauges()
            row = {
                "template": "drops thoughts" if thinks else "keeps history", "active": active, "room": share,
                "tokens": tokens, "blocks": held.blocks, "slots": held.slots, "prompt_tokens": asked,
                "unbounded": unbounded, "served": served, "of_unbounded": served / unbounded,
                "of_prompts": served / asked,
            }  # fmt: skip
            print(
                f"chats, {row['template']}, {active} active, room for {share:g} of {tokens:,} tokens ({held.blocks} blocks, "
                f"{held.slots} slots): {served:,} of {unbounded:,} tokens served, {served / unbounded:.3f} "
                f"({unbounded / asked:.3f} of the prompts' {asked:,} could be)",
                flush=True,
            )
            yield row


def main() -> int:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few of everything")
    parser.add_argument("--only", choices=["resend", "cost", "chats"], help="one part; the others in the file stay")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    quick, found, is_good = options.quick, dict[str, list[dict[str, Any]]](), True
    if options.only in (None, "resend"):
        many = [*range(2, 601), 777, 1023, 1024, 1025, 1500, 2048, 2049, 3001, 4095, 4096]
        found["resend"] = resend(many[:: 60 if quick else 1])
        is_good &= not any(row["wrong"] for row in found["resend"])
    if options.only in (None, "cost"):
        tiny, pairs = build("hybrid"), 3 if quick else 31
        found["cost"] = [cost("tiny hybrid", tiny, 0.05, (24, 96, 32), pairs, drawn) for drawn in (False, True)]
        if not quick:
            dense = registry.build(HybridConfig.model_validate(DENSE))
            dense.init_weights(0)
            dense.eval()
            found["cost"] += [
                cost("dense hybrid of 48M", dense, 1.0, (8, 128, 16), 9, drawn) for drawn in (False, True)
            ]
            is_good &= all(row["process_time"]["median"] <= 1 + MOST_COST for row in found["cost"])
    if options.only in (None, "chats"):
        from pydoc_data.topics import topics

        text = "\n".join(topics.values()).encode()
        size = (6, 3, [(3, 0.5)]) if quick else (CHATS, TURNS, SCENES)
        found["chats"] = list(scenes(*size, text))
        is_good &= quick or found["chats"][0]["of_unbounded"] >= TARGET
    if options.out:
        # each part says when and where it was measured; those that were not stay
        result = json.loads(options.out.read_text()) if options.only and options.out.exists() else {}
        command = " ".join(["python", "benchmarks/prefix_cache.py", *sys.argv[1:]])
        result |= {part: {"machine": machine("cpu"), "command": command, "rows": rows} for part, rows in found.items()}
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
