"""`alloy generate`: continue a prompt on the terminal, or a JSONL file of prompts into a JSONL file of answers."""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from alloy.errors import DataError, InterruptedRun, RequestError, ResourceError

if TYPE_CHECKING:
    from alloy.engine.core import LLM
    from alloy.engine.grammar import Grammar
    from alloy.engine.request import Completion, Output, Request, SamplingParams
    from alloy.engine.runner import EngineStats

# the longest answer when --max-tokens is not given, as far as the model has room
MAX_TOKENS = 256
PROMPT_KEYS = ("prompt", "messages", "token_ids")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint folder or hub id.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopK = Annotated[int, typer.Option(help="Draw from the k likeliest tokens; 0: all.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens of this total probability.")]
MinP = Annotated[float, typer.Option(help="Least probability, as a share of the likeliest token's.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampled answers repeatable.")]
Speculate = Annotated[str, typer.Option(metavar="auto|N", help="Drafts of the MTP layers per step; 0: none.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")]
Weights = Annotated[
    str | None,
    typer.Option(metavar="bf16|int8", help="Keep the matrices in this precision, on a CPU; default: as loaded."),
]
MaxModelLen = Annotated[int | None, typer.Option(help="Longest prompt plus answer; default: the model's.")]


def generate(
    model: Model,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; may be given several times.")] = None,
    source: Annotated[Path | None, typer.Option("--input", help="JSONL with prompt, messages or token_ids.")] = None,
    target: Annotated[Path | None, typer.Option("--output", help="JSONL of answers; answered ids are skipped.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help=f"Longest answer, in tokens; default: {MAX_TOKENS}, less where that does not fit."),
    ] = None,
    min_tokens: Annotated[int, typer.Option(help="Shortest answer, in tokens.")] = 0,
    n: Annotated[int, typer.Option("--n", "-n", help="Answers per prompt.")] = 1,
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    presence_penalty: Annotated[float, typer.Option(help="Against tokens that were generated.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, for each time.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Against tokens of prompt and answer; 1: off.")] = 1.0,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="String that ends the answer; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end of sequence.")] = False,
    logprobs: Annotated[int | None, typer.Option(help="Alternatives per token, in the output file.")] = None,
    thinking_budget: Annotated[int | None, typer.Option(help="Most tokens of thought.")] = None,
    json_schema: Annotated[Path | None, typer.Option(help="File of a JSON Schema that answers must meet.")] = None,
    regex: Annotated[str | None, typer.Option(help="Expression that whole answers must match.")] = None,
    speculate: Speculate = "auto",
    max_seqs: Annotated[int, typer.Option(help="Answers computed at once.")] = 16,
    max_model_len: MaxModelLen = None,
    dtype: Dtype = None,
    device: Device = "auto",
    weights: Weights = None,
) -> None:
    """Continue --prompt and print the answer as it comes, or answer every line of --input into --output."""
    if bool(prompt) == (source is not None):
        raise RequestError("give either --prompt TEXT or --input FILE.jsonl with --output FILE.jsonl")
    if (source is None) != (target is None):
        raise RequestError("--input and --output go together: prompts from one JSONL file, answers to the other")
    from alloy.engine.request import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        n=n,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop or (),
        ignore_eos=ignore_eos,
        logprobs=logprobs,
        thinking_budget=thinking_budget,
        grammar=_grammar(json_schema, regex),
    )
    # a bad file is reported before the model is loaded
    tasks = read_tasks(source, params) if source is not None else []
    drafts = draft_setting(speculate)
    from alloy.engine.core import LLM

    llm = LLM(
        model,
        max_model_len=max_model_len,
        dtype=dtype,
        device=device,
        max_seqs=max_seqs,
        speculate=drafts,
        weights=weights,
    )
    if weights is not None:
        sys.stderr.write(weights_line(llm) + "\n")
    if source is not None and target is not None:
        _answer_file(llm, tasks, source, target)
    else:
        _print_answers(llm, prompt or [], params)


def draft_setting(text: str) -> int | Literal["auto"]:
    """The value of --speculate."""
    if text == "auto":
        return "auto"
    if not text.isdecimal():
        raise RequestError(f'--speculate = "{text}" must be "auto" or a number of tokens from 0')
    return int(text)


def bounded(llm: "LLM", prompt: Sequence[int], params: "SamplingParams", limit: int) -> "SamplingParams":
    """`params` with at most `limit` tokens, or what is left of the model's length, where it sets no bound itself."""
    if params.max_tokens is not None:
        return params
    return replace(params, max_tokens=max(1, params.min_tokens, min(limit, llm.max_model_len - len(prompt))))


def stats_line(stats: "EngineStats") -> str:
    """What a call of the engine did, in one line."""
    prompt = f"prompt {stats.prompt_tokens:,} tokens in {stats.prefill_s:.2f} s"
    answer = f"answer {stats.generated_tokens:,} tokens, {stats.tokens_per_s:,.1f} tokens/s"
    if stats.acceptance_rate is None:
        return f"{prompt}; {answer}"
    places = ", ".join(
        f"{kept / tried:.0%}" for kept, tried in zip(stats.accepted_at, stats.drafted_at, strict=True) if tried
    )
    return f"{prompt}; {answer}; drafts kept {stats.acceptance_rate:.0%} (by position {places})"


def weights_line(llm: "LLM") -> str:
    """The precision of the matrices and the memory it takes, in one line."""
    from alloy.models.quant import full_bytes, weight_bytes

    model = llm.model
    dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    now, full = weight_bytes(model) / 2**20, full_bytes(model) / 2**20
    return f"weights {model.weights}: {now:,.1f} MiB instead of {full:,.1f} MiB in {dtype}"


@dataclass(frozen=True)
class Task:
    """One line of the input file."""

    line: int
    id: str | int
    # text, messages or token ids
    prompt: Any
    params: "SamplingParams"


def read_tasks(path: Path, defaults: "SamplingParams") -> list[Task]:
    """Every line of a JSONL file: {"prompt" | "messages" | "token_ids": ..., "id": optional, "params": {optional}}.

    An id is a string or a number, by default the line's number. Other keys are left alone.
    """
    tasks: list[Task] = []
    seen: dict[str | int, int] = {}
    for number, data in _read_lines(path):
        where = f"{path}:{number}"
        found = [key for key in PROMPT_KEYS if key in data]
        if len(found) != 1:
            raise DataError(f"{where}: needs one of {', '.join(PROMPT_KEYS)}; it has {' and '.join(found) or 'none'}")
        name = data.get("id", number)
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise DataError(f"{where}: id = {json.dumps(name)} is neither a string nor a whole number")
        if name in seen:
            raise DataError(f"{where}: id = {json.dumps(name)} is that of line {seen[name]} already; ids must differ")
        seen[name] = number
        prompt = data[found[0]]
        if not _fits(found[0], prompt):
            raise DataError(
                f"{where}: {found[0]} must be "
                + {"prompt": "a text", "messages": "a list of objects", "token_ids": "a list of whole numbers"}[
                    found[0]
                ]
            )
        tasks.append(Task(number, name, prompt, _line_params(where, number, data, defaults)))
    if not tasks:
        raise DataError(f"{path} has no prompts")
    return tasks


@contextmanager
def open_answers(path: Path) -> Iterator[tuple[set[str | int], int]]:
    """Open the output file for appending by this process alone: (ids answered so far, file descriptor).

    Every answer is one write of a whole line, so a killed run leaves whole lines and at most one torn tail, which is cut.
    """
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ResourceError(f"{path} is being written by another process; wait for it or choose another") from error
        _cut_torn_tail(descriptor)
        answered: set[str | int] = set()
        for number, data in _read_lines(path):
            if "id" not in data or "completions" not in data:
                raise DataError(f"{path}:{number} is not an answer of `alloy generate`; choose another output file")
            answered.add(data["id"])
        yield answered, descriptor
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_line(descriptor: int, data: Mapping[str, Any]) -> None:
    """Append one JSON line in one write."""
    line = (json.dumps(data, ensure_ascii=False) + "\n").encode()
    try:
        written = os.write(descriptor, line)
    except OSError as error:
        raise ResourceError(
            f"the answer could not be written: {error.strerror}; run again once there is room"
        ) from error
    if written < len(line):
        raise ResourceError("the disk is full; make room and run again: answers so far are kept")


def _grammar(json_schema: Path | None, regex: str | None) -> "Grammar | None":
    from alloy.engine.grammar import Grammar

    if json_schema is None:
        return None if regex is None else Grammar("regex", regex)
    if regex is not None:
        raise RequestError("--json-schema and --regex exclude each other; give one of them")
    try:
        return Grammar("json_schema", json_schema.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--json-schema {json_schema} cannot be read as text: {error}") from error


def _answer_file(llm: "LLM", tasks: Sequence[Task], source: Path, target: Path) -> None:
    from alloy.core.logging import ProgressLine
    from alloy.engine.core import gather
    from alloy.engine.request import Completion, Output

    with open_answers(target) as (answered, descriptor):
        open_tasks = [t for t in tasks if t.id not in answered]
        sys.stderr.write(f"{len(tasks):,} prompts, {len(tasks) - len(open_tasks):,} answered already\n")
        requests = [_request(llm, task, source, str(i)) for i, task in enumerate(open_tasks)]
        partial: dict[int, Output] = {}
        done = len(tasks) - len(open_tasks)
        try:
            with ProgressLine(len(tasks), every=max(1, len(tasks) // 20)) as line:
                for news in llm.stream(requests):
                    params = requests[news.index].params
                    if news.index not in partial:
                        empty = [
                            Completion(k, logprobs=None if params.logprobs is None else []) for k in range(params.n)
                        ]
                        partial[news.index] = Output(news.id, news.index, news.prompt_token_ids, empty)
                    gather(partial[news.index], news)
                    if news.finished:
                        write_line(descriptor, _record(open_tasks[news.index], partial.pop(news.index)))
                        done += 1
                        line.update(done, tokens_per_s=llm.stats.tokens_per_s)
        except (KeyboardInterrupt, InterruptedRun) as error:
            code = error.exit_code if isinstance(error, InterruptedRun) else 130
            raise InterruptedRun(
                f"{done:,} of {len(tasks):,} prompts answered in {target}; the same command goes on from there", code
            ) from error
    if open_tasks:
        sys.stderr.write(stats_line(llm.stats) + "\n")


def _print_answers(llm: "LLM", prompts: Sequence[str], params: "SamplingParams") -> None:
    """One answer is streamed; several are printed whole, each under its number."""
    ids = [llm.encode(text) for text in prompts]
    each = [bounded(llm, prompt, params, MAX_TOKENS) for prompt in ids]
    if params.seed is not None:
        each = [replace(p, seed=_nth_seed(params.seed, i)) for i, p in enumerate(each)]
    try:
        if len(ids) == 1 and params.n == 1:
            for news in llm.generate(ids, each, stream=True):
                sys.stdout.write(news.completions[0].text)
                sys.stdout.flush()
            sys.stdout.write("\n")
        else:
            for output in llm.generate(ids, each):
                for answer in output.completions:
                    sys.stdout.write(f"== prompt {output.index + 1}, answer {answer.index + 1}\n{answer.text}\n")
    finally:
        sys.stdout.flush()
        if llm.stats.generated_tokens:
            sys.stderr.write(stats_line(llm.stats) + "\n")


def _record(task: Task, output: "Output") -> dict[str, Any]:
    return {
        "id": task.id,
        "text": output.text,
        "prompt_tokens": len(output.prompt_token_ids),
        "completions": [_completion(c) for c in output.completions],
    }


def _completion(answer: "Completion") -> dict[str, Any]:
    data: dict[str, Any] = {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
    }
    if answer.logprobs is not None:
        data["logprobs"] = [asdict(entry) for entry in answer.logprobs]
    return data


def _request(llm: "LLM", task: Task, path: Path, name: str) -> "Request":
    """The checked request of a line; its error names the line."""
    from alloy.engine.request import Request

    try:
        if isinstance(task.prompt, str):
            ids = llm.encode(task.prompt)
        elif task.prompt and isinstance(task.prompt[0], Mapping):
            ids = llm.encode_chat(task.prompt)
        else:
            ids = task.prompt
        request = Request(id=name, token_ids=ids, params=bounded(llm, ids, task.params, MAX_TOKENS))
        llm.check(request)
    except RequestError as error:
        raise DataError(f"{path}:{task.line}: {error}") from error
    return request


def _line_params(where: str, number: int, data: Mapping[str, Any], defaults: "SamplingParams") -> "SamplingParams":
    from alloy.engine.request import SamplingParams

    known = {f.name for f in fields(SamplingParams)}
    own = data.get("params", {})
    if not isinstance(own, dict):
        raise DataError(f"{where}: params must be an object")
    misplaced = sorted(known & set(data))
    if misplaced:
        raise DataError(f'{where}: {misplaced[0]} belongs into "params"')
    unknown = sorted(set(own) - known)
    if unknown:
        raise DataError(f"{where}: params.{unknown[0]} is unknown; known: {', '.join(sorted(known))}")
    if isinstance(own.get("logit_bias"), dict):
        # JSON has no whole numbers as keys
        own = {**own, "logit_bias": {int(k) if k.isdecimal() else k: v for k, v in own["logit_bias"].items()}}
    if isinstance(own.get("grammar"), dict):
        own = {**own, "grammar": _line_grammar(where, own["grammar"])}
    if defaults.seed is not None and "seed" not in own:
        own = {**own, "seed": _nth_seed(defaults.seed, number)}
    try:
        return SamplingParams(**{**{f.name: getattr(defaults, f.name) for f in fields(SamplingParams)}, **own})
    except RequestError as error:
        raise DataError(f"{where}: params.{error}") from error


def _line_grammar(where: str, data: Mapping[str, Any]) -> "Grammar":
    """{"kind": ..., "text": ...}; the text may be a schema or a list as it is, not as a string."""
    from alloy.engine.grammar import Grammar

    if not {"kind"} <= set(data) <= {"kind", "text"}:
        raise DataError(f'{where}: params.grammar must be {{"kind": ..., "text": ...}}')
    text = data.get("text", "")
    try:
        return Grammar(data["kind"], text if isinstance(text, str) else json.dumps(text))
    except RequestError as error:
        raise DataError(f"{where}: params.{error}") from error


def _nth_seed(seed: int, i: int) -> int:
    """The seed of prompt `i`: with one for all, every prompt would be answered with the same random numbers."""
    return (seed + i) % 2**64


def _fits(key: str, value: object) -> bool:
    if key == "prompt":
        return isinstance(value, str)
    if not isinstance(value, list):
        return False
    if key == "messages":
        return bool(value) and all(isinstance(m, dict) for m in value)
    return all(isinstance(t, int) and not isinstance(t, bool) for t in value)


def _read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not blank."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    with file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                data = json.loads(line)
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: is not UTF-8 (byte {error.start} of the line)") from error
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError(f"{path}:{number}: is not JSON: {error}") from error
            if not isinstance(data, dict):
                raise DataError(f"{path}:{number}: is not a JSON object")
            yield number, data


def _cut_torn_tail(descriptor: int) -> None:
    """Remove an unfinished last line."""
    end = size = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - 65536)
        block = os.pread(descriptor, end - start, start)
        cut = block.rfind(b"\n")
        if cut >= 0:
            end = start + cut + 1
            break
        end = start
    if end < size:
        os.ftruncate(descriptor, end)
