"""The main job: text that any machine has -> tokenizer -> small Nemotron 3 -> measured, sampled, checked, reported.

Six stages, each finished atomically in one folder, so that an interrupted demo goes on where it stopped:
text, training (`alloy pretrain pretrain/demo`), bits per byte against three baselines, samples with and without drafts, the
checkpoint in stock transformers, the report. The measured text is held out by module before anything is counted.

Model size is not counted, so bits per byte are a modelling loss and not a rate of compression.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from alloy.core.device import peak_memory_bytes
from alloy.core.logging import console, short_time
from alloy.core.recipe import RunOptions, load_recipe
from alloy.core.run_report import report_run
from alloy.core.runs import RunDir, acquire_lock, atomic_write, release_lock
from alloy.data.corpus import Corpus, num_bytes, python_corpus, text_corpus
from alloy.data.io import Document, read_documents, write_jsonl
from alloy.engine.core import LLM
from alloy.engine.request import Completion, SamplingParams
from alloy.errors import AlloyError, DataError, RecipeError
from alloy.eval.baselines import kneser_ney_bits_per_byte, lzma_bits_per_byte
from alloy.eval.ppl import LONGEST_WINDOW, bits_per_byte
from alloy.models.base import CausalLM
from alloy.models.registry import load

RECIPE = "pretrain/demo"
SETTINGS, SCORES, SAMPLES = "demo.json", "eval/scores.json", "eval/samples.jsonl"
# parts of the standard corpus that are measured; source code is only ever trained on
MEASURED = ("topics", "docstrings")
DRAFTS = 1
SAMPLE_TOKENS = 96
# stock transformers may differ from us by rounding only
LARGEST_DIFFERENCE = 2e-4


@dataclass(frozen=True)
class Settings:
    """What a user chooses; the same settings continue an interrupted demo."""

    text: Path | None = None
    seconds: float = 250.0
    source_mb: float = 0.0
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, the text's path absolute."""
        return {**asdict(self), "text": str(self.text.resolve()) if self.text else None}


def run_demo(settings: Settings, run_dir: Path | None = None, fresh: bool = False, root: Path = Path("runs")) -> Path:
    """Run the demo to its end, continuing an interrupted one of the same settings, and return its folder."""
    start = time.monotonic()
    if settings.text is not None and not settings.text.exists():
        raise DataError(f"--text {settings.text} does not exist; name a file or folder with text.")
    folder = _folder(settings, run_dir, fresh, root)
    acquire_lock(folder)
    try:
        _say("1/6", "text", f"in {folder}")
        train, held_out = make_text(settings, folder)
        _say("2/6", "training", f"{short_time(settings.seconds)} on {num_bytes(read_documents(train)) / 1e6:.2f} MB")
        checkpoint = train_model(settings, folder, train)
        model, tokenizer = load(checkpoint, dtype=torch.float32, device="cpu")
        assert isinstance(tokenizer, PreTrainedTokenizerFast), "pretraining saves the tokenizer with the model"
        _say("3/6", "bits per byte", "of the held-out text")
        scores = measure(folder / "train", model, tokenizer, train, held_out)
        _say("4/6", "samples", "greedy, plain and with drafts; then drawn")
        scores["samples"] = sample(folder / "train", model, tokenizer, held_out, settings.seed)
        _say("5/6", "checkpoint", f"in stock transformers {transformers.__version__}")
        scores["transformers"] = check_transformers(checkpoint, model, tokenizer, held_out)
        scores["whole demo, seconds"] = round(time.monotonic() - start, 1)
        scores["peak memory, GiB"] = round(peak_memory_bytes() / 2**30, 2)
        atomic_write(folder / "train" / SCORES, json.dumps(scores, indent=1) + "\n")
        report = report_run(folder / "train", title=f"alloy demo, {folder.name}")
        _say("6/6", "report", str(report))
        atomic_write(folder / SETTINGS, json.dumps({**settings.as_dict(), "finished": True}, indent=1) + "\n")
        _closing(folder, checkpoint, held_out, time.monotonic() - start)
    finally:
        release_lock(folder)
    return folder


def make_text(settings: Settings, folder: Path) -> tuple[Path, Path]:
    """Write text/train.jsonl and text/held-out.jsonl, unless they are there, and return their paths."""
    train, held_out = folder / "text" / "train.jsonl", folder / "text" / "held-out.jsonl"
    # the held-out file is written last
    if not held_out.exists():
        if settings.text is not None:
            corpus = text_corpus(settings.text)
            measured = corpus.held_out_documents()
        else:
            corpus = python_corpus(int(settings.source_mb * 1e6))
            measured = corpus.held_out_documents(*MEASURED)
        _describe(corpus)
        write_jsonl(train, corpus.train_documents)
        write_jsonl(held_out, measured)
    return train, held_out


def train_model(settings: Settings, folder: Path, train: Path) -> Path:
    """Pretrain in folder/train, or go on there, and return the checkpoint."""
    run = folder / "train"
    overrides = [
        f"data.sources.0.path={json.dumps(str(train))}",
        f"train.seconds={settings.seconds}",
        f"seed={settings.seed}",
    ]
    loaded = load_recipe(RECIPE, overrides)
    if RunDir(run).status != "done":
        begun = (run / "manifest.json").exists()
        loaded.recipe.run(RunOptions(run_dir=run, resume=str(run) if begun else None, loaded=loaded))
    return run / "checkpoint"


def measure(
    run: Path, model: CausalLM, tokenizer: PreTrainedTokenizerFast, train: Path, held_out: Path
) -> dict[str, Any]:
    """Held-out bits per byte of the model and of three baselines; printed, and returned for scores.json."""
    texts, before = ([document.text for document in read_documents(path)] for path in (held_out, train))
    window = min(model.config.max_positions, LONGEST_WINDOW)
    ours = bits_per_byte(model, tokenizer, texts, window)
    joined = "\n".join(texts)
    rows = {
        "model": ours.bits_per_byte,
        "lzma 9e, held-out text alone": lzma_bits_per_byte(joined),
        "lzma 9e, after the training text": lzma_bits_per_byte(joined, "\n".join(before) + "\n"),
        "Kneser-Ney 5-gram of the training text": kneser_ney_bits_per_byte(texts, before, tokenizer),
    }
    for name, value in rows.items():
        _say("", f"{value:.3f}", name)
    if rows["model"] >= min(value for name, value in rows.items() if name != "model"):
        _say("", "", "the model does not beat every baseline: train it longer (--seconds) or on more text")
    return {"held-out bits per byte": rows, "held-out bytes": ours.bytes, "held-out tokens": ours.tokens}


def sample(run: Path, model: CausalLM, tokenizer: PreTrainedTokenizerFast, held_out: Path, seed: int) -> dict[str, Any]:
    """Continue openings of held-out documents: greedy without and with drafts, which must agree, and drawn."""
    prompts = [_opening(document.text) for document in _spread(list(read_documents(held_out)), 4)]
    greedy = SamplingParams(temperature=0.0, max_tokens=SAMPLE_TOKENS)
    drawn = SamplingParams(temperature=0.8, top_p=0.95, repetition_penalty=1.1, max_tokens=SAMPLE_TOKENS, seed=seed)
    plain, plain_rate = _generate(LLM(model, tokenizer, speculate=0), prompts, greedy)
    drafted, drafted_rate = _generate(LLM(model, tokenizer, speculate=DRAFTS), prompts, greedy)
    free, _ = _generate(LLM(model, tokenizer, speculate=0), prompts, drawn)
    same = [a.token_ids == b.token_ids for a, b in zip(plain, drafted, strict=True)]
    proposed, accepted = (sum(getattr(answer, field) for answer in drafted) for field in ("drafted", "accepted"))
    samples = [
        {"prompt": prompt, "text": answer.text, "how": how}
        for answers, how in ((plain, "greedy"), (free, "temperature 0.8, top_p 0.95, repetition penalty 1.1"))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    for shown in samples[len(prompts) : len(prompts) + 2]:
        console().print(f"[dim]{_escape(shown['prompt'])}[/dim]{_escape(shown['text'])}\n", highlight=False)
    share = accepted / max(1, proposed)
    _say("", f"{sum(same)} of {len(same)}", "greedy answers are the same text with and without drafts")
    _say(
        "",
        f"{share:.0%}",
        f"of {proposed} drafted tokens accepted; {drafted_rate:.0f} tokens/s with drafts, {plain_rate:.0f} without",
    )
    atomic_write(run / SAMPLES, "".join(json.dumps(shown, ensure_ascii=False) + "\n" for shown in samples))
    return {
        "same text with drafts": f"{sum(same)} of {len(same)}",
        "drafts accepted": round(share, 4),
        "tokens/s, plain": round(plain_rate, 1),
        f"tokens/s, {DRAFTS} drafts": round(drafted_rate, 1),
    }


def check_transformers(
    checkpoint: Path, model: CausalLM, tokenizer: PreTrainedTokenizerFast, held_out: Path
) -> dict[str, Any]:
    """Load the folder in stock transformers and compare logits on held-out text; AlloyError if they differ."""
    text = next(iter(read_documents(held_out))).text
    tokens = torch.tensor([tokenizer(text)["input_ids"][:512]])
    with _quiet_transformers():
        stock = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        with torch.no_grad():
            difference = float((stock(tokens, use_cache=False).logits - model.eval()(tokens).logits).abs().max())
    _say("", f"{difference:.1e}", f"largest difference of a logit over {tokens.shape[1]} tokens")
    if not difference <= LARGEST_DIFFERENCE:
        raise AlloyError(
            f"{checkpoint}: logits differ by {difference:.1e} from transformers {transformers.__version__}, more than "
            f"{LARGEST_DIFFERENCE:.0e}; please report this with the run's manifest.json."
        )
    return {"version": transformers.__version__, "largest difference of a logit": difference}


def _folder(settings: Settings, run_dir: Path | None, fresh: bool, root: Path) -> Path:
    """The folder to work in: the one named, an unfinished one of the same settings, or a new one."""
    if run_dir is not None:
        known = _settings(run_dir)
        if known is None and run_dir.exists() and any(run_dir.iterdir()):
            raise RecipeError(f"--run-dir {run_dir} is not empty and no demo; choose a new folder.")
        if known is not None and (known.get("finished") or fresh):
            raise RecipeError(f"--run-dir {run_dir} holds a demo already; choose a new folder.")
        if known is not None and known != settings.as_dict():
            changed = ", ".join(
                f"{k} was {known.get(k)}, now {v}" for k, v in settings.as_dict().items() if known.get(k) != v
            )
            raise RecipeError(
                f"--run-dir {run_dir} holds an unfinished demo of other settings ({changed}); choose a new folder."
            )
        folder = run_dir
    else:
        unfinished = (
            []
            if fresh
            else [
                p.parent for p in sorted(root.glob(f"*_demo*/{SETTINGS}")) if _settings(p.parent) == settings.as_dict()
            ]
        )
        folder = unfinished[-1] if unfinished else root / f"{time.strftime('%Y-%m-%d_%H%M%S')}_demo"
        if unfinished:
            _say("", "going on", f"with the unfinished demo in {folder} (--fresh starts anew)")
    folder.mkdir(parents=True, exist_ok=True)
    if _settings(folder) is None:
        atomic_write(folder / SETTINGS, json.dumps(settings.as_dict(), indent=1) + "\n")
    return folder


def _settings(folder: Path) -> dict[str, Any] | None:
    path = folder / SETTINGS
    return json.loads(path.read_text()) if path.exists() else None


def _describe(corpus: Corpus) -> None:
    for note in corpus.notes:
        _say("", "note", note)
    for part, counts in corpus.counts().items():
        _say(
            "",
            part,
            f"{counts['train_bytes'] / 1e6:.2f} MB to train on, {counts['held_out_bytes'] / 1e6:.3f} MB held out",
        )


def _opening(text: str) -> str:
    """The first 60 characters or so, cut at a word."""
    start = text.strip()[:60]
    return start.rsplit(" ", 1)[0] if " " in start else start


def _spread(documents: Sequence[Document], count: int) -> list[Document]:
    """`count` documents evenly spread over the list, long enough to open with."""
    long = [document for document in documents if len(document.text) > 200] or list(documents)
    count = min(count, len(long))
    return [long[i * len(long) // count] for i in range(count)]


def _generate(llm: LLM, prompts: list[str], params: SamplingParams) -> tuple[list[Completion], float]:
    """Answers, one prompt at a time, and tokens per second of process."""
    answers: list[Completion] = []
    start = time.perf_counter()
    for prompt in prompts:
        answers += llm.generate(prompt, params)[0].completions
    return answers, sum(len(answer.token_ids) for answer in answers) / (time.perf_counter() - start)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its progress bar and its warnings: kernels that are not installed, MTP weights that it drops by design."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.enable_progress_bar()
        transformers.logging.set_verbosity(level)


def _say(stage: str, what: str, words: str) -> None:
    head = f"[bold]{stage}[/bold] " if stage else "    "
    console().print(f"{head}{_escape(what):<10} {_escape(words)}", highlight=False)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _closing(folder: Path, checkpoint: Path, held_out: Path, seconds: float) -> None:
    shown = Path(os.path.relpath(checkpoint))
    prefix = "" if sys.prefix == sys.base_prefix else f"{Path(os.path.relpath(sys.prefix))}/bin/"
    _say("", "done", f"in {short_time(seconds)}, peak memory {peak_memory_bytes() / 2**30:.2f} GiB. Next:")
    for command in (
        f'generate {shown} --prompt "Return a new"',
        f"chat {shown}",
        f"eval {shown} --ppl {os.path.relpath(held_out)}",
        f"model info {shown}",
    ):
        console().print(f"      {prefix}alloy {command}", highlight=False, markup=False, soft_wrap=True)
