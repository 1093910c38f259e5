"""Exactness: a greedy answer is the same token for token however the engine computed it (serving.md section 0.2).

Each way of computing answers (`WAYS`) runs the engine so that it must happen, shows that it did, and hands over the answers.
The reference knows neither engine nor cache: one plain forward pass over prompt and answer, whose largest logit at each
position is the only right next token, except where a thinking budget, counted here in a loop over the text, says another.

Two computations round differently. A token that differs counts as a tie where the reference's logit of it is within 1e-5 of
the largest, or where a router chose, there or before, between scores that close; otherwise the answer differs. In bf16 two
computations of one thing are no closer than its rounding: there the share of tokens that differ says something, and by how
much less the reference likes the first of them.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from alloy.bench.tiny import build, byte_tokenizer, teach
from alloy.engine.codec import Codec
from alloy.engine.core import LLM
from alloy.engine.engine import LEAST_BRANCH
from alloy.engine.request import Request, SamplingParams
from alloy.errors import AlloyError, DataError
from alloy.models import sizes
from alloy.models.base import CausalLM
from alloy.models.moe import MoE
from alloy.models.registry import load
from alloy.ops.attention import BLOCK

TIE = 1e-5
# longest prompt with its answer: what the tiny models take
LONGEST = 160
BATCH = 64
MODELS_PER_FAMILY = 8
NAMES = {"attention": "attention", "hybrid": "dense hybrid", "moe": "MoE hybrid", "mtp": "MTP hybrid"}


@dataclass(frozen=True)
class Subject:
    """A model, and how prompts for it are made.

    Attributes:
        prompt: draws a prompt of so many tokens
    """

    model: CausalLM
    tokenizer: PreTrainedTokenizerBase
    prompt: Callable[[random.Random, int], list[int]]


@dataclass(frozen=True)
class Budget:
    """The rule of a thinking budget; `close` is forced when it is spent, its last token ends the thought."""

    tokens: int
    grace: int
    start: int
    close: list[int]
    newlines: frozenset[int]

    def opened(self, prompt: Sequence[int]) -> int | None:
        """Thought tokens at the end of a prompt whose last thought is open; None: none is."""
        last = max((i for i, token in enumerate(prompt) if token in (self.start, self.close[-1])), default=None)
        return None if last is None or prompt[last] != self.start else len(prompt) - 1 - last

    def forced(self, prompt: Sequence[int], answer: Sequence[int]) -> tuple[list[int | None], int]:
        """Per position of an answer the token that must stand there, or None; and how many are thought."""
        count, is_open = self.opened(prompt) or 0, self.opened(prompt) is not None
        due = deque(self.close if is_open and count >= self.tokens else [])
        wanted: list[int | None] = []
        for token in answer:
            wanted.append(due.popleft() if due else None)
            if wanted[-1] is not None:
                is_open = False
                continue
            if token == self.close[-1]:
                is_open = False
            elif is_open:
                count += 1
            elif token == self.start:
                is_open = True
            soft = token in self.newlines and token != self.start and count > self.tokens - self.grace
            if is_open and (count >= self.tokens or soft):
                due.extend(self.close)
        return wanted, count


@dataclass
class Answer:
    """What the engine said, and how it came about.

    Attributes:
        rounds: in which of the engine's rounds it grew
        added: the round before which it was asked for
    """

    prompt: list[int]
    added: int
    length: int
    tokens: list[int] = field(default_factory=list[int])
    rounds: list[int] = field(default_factory=list[int])
    cached: int = 0
    drafted: int = 0
    accepted: int = 0
    reasoning: int = 0
    budget: Budget | None = None

    @property
    def was_put_back(self) -> bool:
        """Whether it stood still after it had begun: a running sequence gets a token in every round."""
        return any(later > earlier + 1 for earlier, later in zip(self.rounds, self.rounds[1:], strict=False))


@dataclass
class Cell:
    """One way with one family: counts, and what shows that the way was taken.

    Attributes:
        close: answers with a position at which the reference's two best logits are within 1e-5, whatever was answered
        ties: answers that differ where the reference cannot decide, each as a sentence
        differing: each as a sentence
        missing: what should have happened and did not
        other: tokens that are not the reference's, each given the text before it
        gaps: of each answer that has some, at the first of them: the reference's logits of its own token and of this one, one
            less the other, and the closest choice of a router so far
    """

    way: str
    family: str
    answers: int = 0
    tokens: int = 0
    close: int = 0
    ties: list[str] = field(default_factory=list[str])
    differing: list[str] = field(default_factory=list[str])
    missing: list[str] = field(default_factory=list[str])
    other: int = 0
    gaps: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    seen: dict[str, int] = field(default_factory=dict[str, int])

    def count(self, name: str, number: int) -> None:
        """Add to what was seen."""
        self.seen[name] = self.seen.get(name, 0) + number

    def need(self, holds: bool, what: str) -> None:
        """Note what did not happen."""
        if not holds and what not in self.missing:
            self.missing.append(what)


def whole_pass(model: CausalLM, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """One plain pass: logits (tokens, vocab), and per position (tokens,) the closest choice of any router so far: the distance
    between the last score that was chosen and the first that was not."""
    device = model.embed.weight.device
    closest = torch.full((len(tokens),), torch.inf, device=device)

    def watch(moe: MoE) -> Callable[[nn.Module, object, Tensor], None]:
        config = moe.config
        if config.num_router_groups > 1:
            raise AlloyError("exactness: routers that choose groups first are not measured; take another checkpoint")

        def look(_gate: nn.Module, _inputs: object, logits: Tensor) -> None:
            scores = logits.sigmoid() if config.router == "sigmoid" else logits.softmax(-1)
            if moe.gate.bias is not None:
                scores = scores + moe.gate.bias
            best = scores.topk(config.top_k + 1).values
            torch.minimum(closest, best[:, -2] - best[:, -1], out=closest)

        return look

    hooks = [m.gate.register_forward_hook(watch(m)) for m in model.modules() if isinstance(m, MoE)]
    try:
        with torch.no_grad():
            logits = model(torch.tensor([list(tokens)], device=device)).logits
    finally:
        for hook in hooks:
            hook.remove()
    assert logits is not None, "the call asked for logits"
    return logits[0].float().cpu(), closest.cummin(0).values.cpu()


def tie_or_difference(
    model: CausalLM, prompt: Sequence[int], want: Sequence[int], got: Sequence[int]
) -> tuple[bool, str]:
    """Whether two answers part where the reference cannot tell, and in words where they do."""
    logits, closest = whole_pass(model, [*prompt, *want])
    first = next((i for i, (a, b) in enumerate(zip(want, got, strict=False)) if a != b), min(len(want), len(got)))
    row = len(prompt) + first - 1
    best = logits[row].topk(2).values
    gap, margin = float(best[0] - best[1]), float(closest[row])
    return min(gap, margin) < TIE, f"token {first}: logits {gap:.1e} apart, routing scores {margin:.1e}"


def check(cell: Cell, model: CausalLM, answer: Answer) -> None:
    """Compare an answer with the reference and enter it into its cell."""
    prompt, tokens = answer.prompt, answer.tokens
    cell.answers += 1
    cell.tokens += len(tokens)
    cell.need(len(tokens) == answer.length, "an answer has another length than was asked for")
    forced: list[int | None] = [None] * len(tokens)
    if answer.budget is not None:
        forced, thought = answer.budget.forced(prompt, tokens)
        cell.need(thought == answer.reasoning, "the engine counts other thought tokens than the text has")
        cell.need(thought <= max(answer.budget.tokens, answer.budget.opened(prompt) or 0), "a budget was exceeded")
    logits, closest = whole_pass(model, [*prompt, *tokens[:-1]])
    logits, closest = logits[len(prompt) - 1 :], closest[len(prompt) - 1 :]
    two = logits.topk(2).values
    cell.close += bool((two[:, 0] - two[:, 1] < TIE).any())
    best = logits.max(-1)
    behind = best.values - logits[torch.arange(len(tokens)), torch.tensor(tokens)]
    wanted = [int(token) if due is None else due for token, due in zip(best.indices, forced, strict=True)]
    differing = [i for i, (token, want) in enumerate(zip(tokens, wanted, strict=True)) if token != want]
    cell.other += len(differing)
    cell.gaps += [(float(behind[i]), float(closest[i])) for i in differing[:1]]
    is_tie = False
    for i in differing:
        token, want = tokens[i], wanted[i]
        words = (
            f"{cell.way}, {cell.family}, answer {cell.answers}, token {i}: {token} for {want}, logits {behind[i]:.1e} apart, "
            f"routing scores {closest[i]:.1e}"
        )
        if forced[i] is not None or min(float(behind[i]), float(closest[i])) >= TIE:
            cell.differing.append(words)
            return
        if not is_tie:
            cell.ties.append(words)
        is_tie = True


def drive(llm: LLM, requests: Sequence[Request], together: bool = True) -> tuple[list[Answer], int]:
    """Answer requests, all at once or each asked for when the one before has begun; and the most rows of one round."""
    engine, waiting = llm.engine(), deque(requests)
    answers: dict[str, Answer] = {}
    number = widest = 0
    last: Answer | None = None
    while waiting or engine.busy:
        while waiting and (together or last is None or last.rounds):
            request = waiting.popleft()
            engine.add(request)
            last = answers[request.id] = Answer(list(request.token_ids), number, request.params.max_tokens or 0)
        found = engine.step()
        for news in found:
            answer, new = answers[news.id], news.completions[0]
            answer.tokens += new.token_ids
            answer.rounds.append(number)
            answer.cached = news.cached_tokens
            answer.drafted, answer.accepted, answer.reasoning = new.drafted, new.accepted, new.reasoning_tokens
        widest = max(widest, len(found))
        number += 1
    return [answers[request.id] for request in requests], widest


def greedy(length: int) -> SamplingParams:
    """The likeliest tokens, so many."""
    return SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)


def ask(
    subject: Subject, r: random.Random, count: int, prompts: tuple[int, int], lengths: tuple[int, int]
) -> list[Request]:
    """Requests with prompts and answers of lengths within bounds."""
    return [
        Request(id=str(i), token_ids=subject.prompt(r, r.randint(*prompts)), params=greedy(r.randint(*lengths)))
        for i in range(count)
    ]


def alone(cell: Cell, subject: Subject, r: random.Random, count: int) -> list[Answer]:
    """One request after the other, whole prompts, nothing reused."""
    llm = LLM(subject.model, max_model_len=LONGEST, max_seqs=1, speculate=0, prefix_cache=False)
    answers: list[Answer] = []
    for request in ask(subject, r, count, (1, 110), (8, 40)):
        found, widest = drive(llm, [request])
        cell.need(widest == 1 and not found[0].cached, "a request was not alone")
        answers += found
    return answers


def batched(cell: Cell, subject: Subject, r: random.Random, count: int) -> list[Answer]:
    """64 at once."""
    llm = LLM(subject.model, max_model_len=LONGEST, max_seqs=BATCH, speculate=0, prefix_cache=False)
    answers: list[Answer] = []
    while len(answers) < count:
        found, widest = drive(llm, ask(subject, r, BATCH, (1, 60), (20, 40)))
        cell.need(widest == BATCH, f"no round had {BATCH} rows")
        cell.count(f"rounds with {BATCH} rows", int(widest == BATCH))
        answers += found
    return answers


def chunked(cell: Cell, subject: Subject, r: random.Random, count: int) -> list[Answer]:
    """Prompts in pieces, beside answers that have begun."""
    size = r.choice([3, 7, 16, 31])
    llm = LLM(subject.model, max_model_len=LONGEST, max_step_tokens=size, speculate=0, prefix_cache=False)
    requests = ask(subject, r, count, (size + 2, 110), (8, 40))
    answers, widest = drive(llm, requests, together=False)
    cell.count("rows beside", widest - 1)
    for answer in answers:
        # each asked for when the one before had begun: a round computes a piece of its prompt
        pieces = answer.rounds[0] - answer.added + 1
        cell.need(pieces >= -(-(len(answer.prompt) - 1) // size) > 1, "a prompt was computed in one piece")
        cell.count("pieces", pieces)
    return answers


def preempted(cell: Cell, subject: Subject, r: random.Random, count: int) -> list[Answer]:
    """Answers that grow into a second block where there is not one for each: the youngest are put back. Those count."""
    config, rows, answers = subject.model.config, 4, list[Answer]()
    dtype = str(subject.model.embed.weight.dtype).removeprefix("torch.")
    slot = sizes.state_bytes(config, 1, "float32", subject.model.has_mtp)
    slot += sizes.conv_bytes(config, 1, dtype, subject.model.has_mtp)
    block = sizes.kv_bytes(config, 1, BLOCK, dtype, subject.model.has_mtp)
    for _ in range(20 + count):
        has_cache = r.random() < 0.5
        room = rows * slot + r.randint(5, 6) * block
        llm = LLM(
            subject.model, max_model_len=120, max_seqs=rows, speculate=0, prefix_cache=has_cache, memory=room / sizes.GIB
        )  # fmt: skip
        found, _ = drive(llm, ask(subject, r, 8, (30, 62), (36, 50)))
        cell.count("preemptions", llm.engine().stats.preemptions)
        answers += [answer for answer in found if answer.was_put_back]
        if len(answers) >= count:
            break
    cell.need(len(answers) >= count, "too few answers were put back")
    return answers[:count]


def prefix_hit(cell: Cell, subject: Subject, r: random.Random, count: int, speculate: int = 0) -> list[Answer]:
    """Prompts of which the first tokens, any number of them, are what another request left."""
    llm = LLM(subject.model, max_model_len=LONGEST, max_seqs=8, speculate=speculate)
    shared = r.sample(range(1, 120), count)
    before, requests = list[Request](), list[Request]()
    for i, size in enumerate(shared):
        prompt = subject.prompt(r, size + r.randint(1, 10))
        other = (prompt[size] + 1) % subject.model.config.vocab
        # each pair in a tree of its own: no third request is in the way
        before.append(Request(id=f"before {i}", token_ids=[*prompt[:size], other], params=greedy(1), salt=str(i)))
        requests.append(Request(id=str(i), token_ids=prompt, params=greedy(r.randint(8, 30)), salt=str(i)))
    drive(llm, before)
    answers, _ = drive(llm, requests)
    _check_hits(cell, answers, shared)
    return answers


def branch_hit(cell: Cell, subject: Subject, r: random.Random, count: int, speculate: int = 0) -> list[Answer]:
    """The third and fourth prompt with one beginning: the second left the state where it parted from the first."""
    llm = LLM(subject.model, max_model_len=LONGEST, max_seqs=8, speculate=speculate)
    is_recurrent = sizes.state_bytes(subject.model.config, 1) > 0
    shared = [size for size in r.sample(range(LEAST_BRANCH, 100), -(-count // 2)) for _ in range(2)]
    asked: list[list[Request]] = [[], [], []]
    for i, size in enumerate(shared[::2]):
        beginning = subject.prompt(r, size)
        for k, first in enumerate(r.sample(range(subject.model.config.vocab), 4)):
            tail = [first, *subject.prompt(r, r.randint(2, 20))]
            params = greedy(r.randint(8, 30) if k > 1 else 2)
            asked[min(k, 2)].append(
                Request(id=f"{i} {k}", token_ids=[*beginning, *tail], params=params, salt=str(i))
            )  # fmt: skip
    drive(llm, asked[0])
    second, _ = drive(llm, asked[1])
    if is_recurrent:
        _check_hits(cell, second, [0] * len(second))
    answers, _ = drive(llm, asked[2])
    _check_hits(cell, answers, shared)
    return answers


def drafted(cell: Cell, subject: Subject, r: random.Random, count: int) -> list[Answer]:
    """Several tokens a round, guessed by the multi-token prediction."""
    llm = LLM(subject.model, max_model_len=LONGEST, max_seqs=4, speculate=r.randint(1, 4), prefix_cache=False)
    answers, _ = drive(llm, ask(subject, r, count, (1, 110), (8, 40)))
    _count_drafts(cell, answers)
    return answers


def hit_and_drafted(cell: Cell, subject: Subject, r: random.Random, count: int) -> list[Answer]:
    """Drafts behind a hit of either kind."""
    way = r.choice([prefix_hit, branch_hit])
    answers = way(cell, subject, r, count, r.randint(1, 4))
    _count_drafts(cell, answers)
    return answers


def budgeted(cell: Cell, subject: Subject, r: random.Random, count: int) -> list[Answer]:
    """A thought that is open in the prompt and closed by its budget, with drafts."""
    llm = LLM(subject.model, subject.tokenizer, max_model_len=LONGEST, max_seqs=4, speculate=r.randint(1, 4))
    codec = llm.codec
    assert codec is not None, "a tokenizer was given"
    assert codec.markers is not None, "the tokenizers here have markers of one token"
    opens, closes = codec.markers.ids
    newlines = frozenset(i for i in range(len(subject.tokenizer)) if "\n" in codec.decode([i]))
    requests, budgets = list[Request](), list[Budget]()
    for i in range(count):
        prompt = [*subject.prompt(r, r.randint(1, 80)), opens, *subject.prompt(r, r.randint(1, 8))]
        budget, grace = r.randint(0, 24), r.choice([0, 0, 5])
        close = r.choice(["", "\nSo:\n"])
        ids = [*(codec.encode(close, "close", add_special_tokens=False) if close else []), closes]
        params = SamplingParams(
            temperature=0,
            max_tokens=r.randint(16, 40),
            ignore_eos=True,
            thinking_budget=budget,
            thinking_grace=grace,
            thinking_close_text=close,
        )
        requests.append(Request(id=str(i), token_ids=prompt, params=params))
        budgets.append(Budget(budget, grace, opens, ids, newlines))
    answers, _ = drive(llm, requests)
    for answer, budget in zip(answers, budgets, strict=True):
        answer.budget = budget
        forced, thought = budget.forced(answer.prompt, answer.tokens)
        cell.count("closed by the budget", int(any(token is not None for token in forced)))
        cell.count("used to the last token", int(thought == budget.tokens))
    _count_drafts(cell, answers)
    return answers


def _check_hits(cell: Cell, answers: Sequence[Answer], wanted: Sequence[int]) -> None:
    for answer, size in zip(answers, wanted, strict=True):
        cell.need(answer.cached == size, "a hit had another length than was wanted")
        cell.count("cached tokens", answer.cached)


def _count_drafts(cell: Cell, answers: Sequence[Answer]) -> None:
    accepted = sum(answer.accepted for answer in answers)
    cell.count("drafts accepted", accepted)
    cell.count("drafts rejected", sum(answer.drafted for answer in answers) - accepted)


@dataclass(frozen=True)
class Way:
    """A way of computing answers; `shows` names what must be above zero at its end."""

    run: Callable[[Cell, Subject, random.Random, int], list[Answer]]
    shows: tuple[str, ...] = ()
    drafts: bool = False


DRAFTS = ("drafts accepted", "drafts rejected")
WAYS = {
    "alone": Way(alone),
    "batch of 64": Way(batched, (f"rounds with {BATCH} rows",)),
    "chunked prefill": Way(chunked, ("pieces", "rows beside")),
    "preempted": Way(preempted, ("preemptions",)),
    "prefix hit, any length": Way(prefix_hit, ("cached tokens",)),
    "branch hit": Way(branch_hit, ("cached tokens",)),
    "drafted": Way(drafted, DRAFTS, drafts=True),
    "hit + drafted": Way(hit_and_drafted, ("cached tokens", *DRAFTS), drafts=True),
    "budgeted + drafted": Way(
        budgeted, ("closed by the budget", "used to the last token", *DRAFTS), drafts=True
    ),
}  # fmt: skip


def random_subject(
    family: str, seed: int, drafting: bool, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Subject:
    """A random tiny model; of those that draft every second one is taught a pattern, or next to no draft would be right."""
    r = random.Random(seed)
    period = [r.randrange(256) for _ in range(7)]
    model = build(family, seed, drafting)
    is_taught = drafting and seed % 2 == 0
    if is_taught:
        teach(model, period)

    def prompt(r: random.Random, length: int) -> list[int]:
        if is_taught and r.random() < 0.5:
            return (period * (length // 7 + 2))[r.randrange(7) :][:length]
        return [r.randrange(256) for _ in range(length)]

    return Subject(model.to(device, dtype), byte_tokenizer(), prompt)


def text_subject(
    folder: Path, texts: Sequence[str], device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Subject:
    """A trained model that drafts and thinks, such as the demo's; prompts are cut from texts."""
    model, tokenizer = load(folder, dtype=dtype, device=device)
    if tokenizer is None or not model.has_mtp or Codec(tokenizer).markers is None:
        raise DataError(
            f"{folder}: no multi-token prediction, or no tokenizer with thought markers; take a demo's checkpoint"
        )
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    long = [piece for piece in ids if len(piece) >= LONGEST]

    def prompt(r: random.Random, length: int) -> list[int]:
        piece = r.choice(long)
        at = r.randrange(len(piece) - length + 1)
        return piece[at : at + length]

    return Subject(model.eval(), tokenizer, prompt)


def measure(way: str, family: str, subjects: Sequence[Subject], count: int, seed: int) -> Cell:
    """At least `count` answers of one way, spread over models."""
    cell, chosen = Cell(way, family), WAYS[way]
    share = -(-count // len(subjects))
    for i, subject in enumerate(subjects):
        wanted = min(share, count - cell.answers)
        if wanted <= 0:
            break
        r = random.Random(f"{seed} {way} {family} {i}")
        for answer in chosen.run(cell, subject, r, wanted):
            check(cell, subject.model, answer)
    for name in chosen.shows:
        cell.need(cell.seen.get(name, 0) > 0, f"{name}: none")
    return cell


def matrix(
    answers: int,
    seed: int,
    trained: Subject | None = None,
    models: int = MODELS_PER_FAMILY,
    families: Sequence[str] = tuple(NAMES),
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Iterator[Cell]:
    """Every way with random models of every family, and with a trained one: cells as they are done, `answers` in all."""
    share = -(-answers // (len(WAYS) * (len(families) + (trained is not None))))
    for family in families:
        subjects = {
            drafting: [random_subject(family, seed * models + i, drafting, device, dtype) for i in range(models)]
            for drafting in (False, True)
        }
        for way, chosen in WAYS.items():
            yield measure(way, NAMES[family], subjects[chosen.drafts], share, seed)
    if trained is not None:
        for way in WAYS:
            yield measure(way, "checkpoint", [trained] * models, share, seed)
