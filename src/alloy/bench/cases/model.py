"""Whole models with random weights: decoding, prompts, a training step.

Floors: of decoding, the bytes of a step (weights of dense layers and of the experts that this step really chose, keys and
values of the context, states and convolution inputs read and written); of a prompt and of training, the operations of
`models.sizes`, in training three times. Keys, values and states are random: their size counts, not what they say.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from alloy import ops
from alloy.bench import peers
from alloy.bench.case import Outputs, Problem, Size
from alloy.core.device import memory_bytes, resolve_device
from alloy.losses.lm import linear_cross_entropy
from alloy.models import moe, sizes
from alloy.models.base import CausalLM
from alloy.models.configs import HybridConfig, MoEConfig
from alloy.models.graphs import BUCKETS, DecodeGraphs, obstacle
from alloy.models.paged import PagedCache, blocks_of
from alloy.models.presets import preset
from alloy.models.registry import build
from alloy.ops.moe import choose
from alloy.train.optim import Optimizers, clip_gradients, gradient_norm
from alloy.train.precision import Precision, compute_in

# 1.046 B parameters: 12 Mamba-2, 12 MLP and 2 attention layers (performance.md, section 9.4)
HYBRID_1B = HybridConfig(
    pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-",
    vocab=65_536,
    hidden=2048,
    ffn=8192,
    num_heads=16,
    num_kv_heads=4,
    head_dim=128,
    ssm_heads=64,
    ssm_head_dim=64,
    ssm_state=128,
    ssm_groups=8,
    # transformers floors dt at this value in training
    time_step_min=1e-9,
)
ROWS, SEQ = 4, 4096


MODELS = {
    "Nano-9B": "nemotron-nano-9b-v2",
    "Nano-30B": "nemotron-3-nano-30b-a3b",
    "Qwen3-8B": "qwen3-8b",
    "Qwen3-30B": "qwen3-30b-a3b",
    **{name: name for name in ("tiny-dense", "tiny-moe", "tiny-qwen3")},
}
CONTEXTS = {"8k": 8192, "16k": 16_384, "70": 70}
BATCHES = (1, 8, 64)
# tokens that a timed sequence may grow by
ROOM = 256
# of a decode step's reference
ROWS_AT_ONCE = 8
# model, label, tokens of the prompt, tokens at once; a million tokens take minutes: benchmarks/long_context.py
PROMPTS = (
    *((name, "8k", 8192, 8192) for name in MODELS if not name.startswith("tiny")),
    ("Nano-9B", "64k", 65_536, 8192),
    ("Nano-30B", "64k", 65_536, 8192),
    ("Nano-9B", "128k by 2048", 131_072, 2048),
)
# two ways of computing a deep bf16 model differ by this much in their logits, with the same experts
DEEP = 0.1
_HELD: dict[str, CausalLM] = {}


@dataclass
class Serving:
    """A model, a cache with room for all rows, and what was captured of its decode step (None: it runs eagerly).

    Attributes:
        rows: slots of the sequences
        tokens: newest token of each row, or the prompt
    """

    model: CausalLM
    pool: PagedCache
    rows: list[int]
    tokens: Tensor
    graphs: DecodeGraphs | None = None
    started: bool = False
    # a step of transformers' model
    peer: Callable[[], object] | None = None


class Routes:
    """The experts that a pass through `model` chose, for another pass to choose the same ones.

    In a deep model with random weights rounding tips some choices over, and from there on two passes compute different things:
    logits of 52 layers in bf16 and in fp32 then differ by 10 to 50%.
    """

    def __init__(self, model: CausalLM) -> None:
        self._chosen: dict[moe.MoE, list[Tensor]] = {
            module: [] for module in model.modules() if isinstance(module, moe.MoE)
        }

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keep what is chosen inside."""

        def record(module: moe.MoE, *args: Any, **kwargs: Any) -> Any:
            found = ops.route(*args, **kwargs)
            self._chosen[module].append(found[0])
            return found

        with self._routed({module: partial(record, module) for module in self._chosen}):
            yield

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Choose it again inside, whatever the pieces in which the same tokens come; weights are computed as ever."""
        # the blocks of multi-token prediction did not run
        left = {module: torch.cat(chosen) for module, chosen in self._chosen.items() if chosen}

        def repeat(module: moe.MoE, logits: Tensor, bias: Tensor | None, top_k: int, **kwargs: Any) -> Any:
            chosen, left[module] = left[module].tensor_split([len(logits)])
            # so far above the others that no score matters
            wanted = logits.new_zeros(logits.shape, dtype=torch.float32).scatter(1, chosen, 1e4)
            return choose(logits, wanted, top_k, kwargs["scoring"], 1, 1, kwargs["normalize"], kwargs["scale"])

        with self._routed({module: partial(repeat, module) for module in left}):
            yield

    @contextmanager
    def _routed(self, routes: Mapping[moe.MoE, Callable[..., Any]]) -> Iterator[None]:
        for module, route in routes.items():
            module.route = route
        try:
            yield
        finally:
            for module in routes:
                module.route = ops.route


@dataclass
class Training:
    """A model in training, what steps it, and tokens (rows, seq + 1)."""

    model: CausalLM
    optimizer: Optimizers | torch.optim.Optimizer
    tokens: Tensor
    precision: Precision
    # transformers' model, once it has taken the place of ours
    peer: Any = None


def decode(size: Size) -> Iterator[Problem]:
    """One token of every sequence at 8k and 16k tokens of context, up to the largest batch that fits."""
    grid = {"full": _decode_grid, "quick": lambda: [("Nano-9B", "8k", n) for n in (1, 64)], "tiny": _tiny_grid}[size]()
    for name, length, batch in grid:
        context = CONTEXTS[length]
        config = preset(MODELS[name])
        yield Problem(
            f"{name} {length} batch {batch}",
            partial(draw_decode, MODELS[name], context, batch),
            decode_step,
            partial(_decode_plainly, context),
            bytes=partial(step_bytes, context),
            peers={"transformers": _decode_transformers},
            flops=batch * sizes.flops_per_token(config, context, causal_mean=False),
            tolerance=DEEP,
            tokens=batch,
            holds_inputs=True,
        )


def _tiny_grid() -> list[tuple[str, str, int]]:
    return [(name, "70", 3) for name in ("tiny-dense", "tiny-moe", "tiny-qwen3")]


def _decode_grid() -> Iterator[tuple[str, str, int]]:
    memory = memory_bytes(resolve_device())
    for name in MODELS:
        if name.startswith("tiny"):
            continue
        for length in ("8k", "16k"):
            setting, context = sizes.Setting(mtp=False), CONTEXTS[length] + ROOM
            most = sizes.fits(preset(MODELS[name]), memory, 1, context, setting).largest_batch
            largest = max((bucket for bucket in BUCKETS if bucket <= most), default=0)
            yield from ((name, length, batch) for batch in sorted({*BATCHES, largest}) if 0 < batch <= largest)


def prefill(size: Size) -> Iterator[Problem]:
    """A prompt through the cache, in chunks; the measured peak stands beside the planner's."""
    prompts = PROMPTS
    if size == "quick":
        prompts = PROMPTS[:1]
    if size == "tiny":
        prompts = (("tiny-moe", "70 by 32", 70, 32),)
    for name, label, tokens, chunk in prompts:
        config = preset(MODELS[name])
        head = 2 * sizes.embedding_parameters(config)
        flops = tokens * (sizes.flops_per_token(config, tokens) - head) + head
        # beyond 8k the plain ops take too long: other chunks must give the same
        reference = partial(_prompt_again, chunk, 4 * chunk if tokens > 8192 else None)
        planned = sizes.memory(config, 1, tokens, sizes.Setting(mtp=False, prefill_chunk=chunk, graphs=0), sizes.GIB)
        yield Problem(
            f"{name} {label}",
            partial(_draw_prompt, MODELS[name], tokens),
            partial(_prompt, chunk),
            reference,
            bytes=sizes.weight_bytes(config, mtp=False),
            flops=flops,
            tolerance=DEEP,
            tokens=tokens,
            holds_inputs=True,
            planned_bytes=planned.total - planned.reserved,
        )


def training(size: Size) -> Iterator[Problem]:
    """One step over 16,384 tokens: bf16 parameters and AdamW states, then fp32 ones under autocast."""
    config = preset("tiny-dense") if size == "tiny" else HYBRID_1B
    rows, seq = (2, 33) if size == "tiny" else (ROWS, SEQ)
    formats: dict[str, tuple[Precision, torch.dtype]] = {
        "bf16 parameters": ("fp32", torch.bfloat16),
        "fp32 parameters": ("bf16", torch.float32),
    }
    for label, (precision, dtype) in formats.items():
        yield Problem(
            f"{rows} x {seq}, {label}",
            partial(draw_training, config, dtype, precision, rows, seq),
            train,
            loss_in_fp32,
            peers={"transformers": train_transformers} if dtype == torch.bfloat16 else {},
            # parameters, gradients and two moments are read and written
            bytes=8.0 * dtype.itemsize * sizes.parameters(config),
            flops=3.0 * rows * seq * sizes.flops_per_token(config, seq),
            tolerance=1e-2,
            tokens=rows * seq,
            holds_inputs=True,
        )


def _model(name: str) -> CausalLM:
    """The one model in memory, on the default device: problems share it."""
    if name not in _HELD:
        _HELD.clear()
        _HELD[name] = build(preset(name), torch.get_default_device(), torch.bfloat16).eval()
    return _HELD[name]


def _serving(name: str, batch: int, tokens: int) -> Serving:
    """A model and an empty cache for `batch` sequences of `tokens` tokens."""
    model = _model(name)
    pool = model.new_paged_cache(batch, batch * blocks_of(tokens), tokens)
    # the same cache whether the model was made just now or before
    torch.manual_seed(1)
    return Serving(model, pool, pool.open(batch), torch.randint(0, model.config.vocab, (batch, 1)))


@torch.no_grad()
def _fill(pool: PagedCache, context: int) -> None:
    """Every sequence holds `context` random tokens, the same ones each time."""
    torch.manual_seed(2)
    pool.lengths[:-1] = context
    for tensor in (*pool.arenas, pool.states.ssm, pool.states.conv):
        tensor.normal_(std=0.5)


@torch.no_grad()
def draw_decode(name: str, context: int, batch: int) -> Serving:
    """Every row holds `context` random tokens; on a GPU the step is captured."""
    i = _serving(name, batch, context + ROOM)
    i.pool.reserve(i.rows, context)
    i.pool.count(i.rows, context)
    _fill(i.pool, context)
    if obstacle(i.model) is None:
        i.graphs = DecodeGraphs(i.model, i.pool, [next(bucket for bucket in BUCKETS if bucket >= batch)])
    return i


def decode_step(i: Serving) -> Outputs:
    """One step: captured, or as calls where nothing can be captured."""
    if i.graphs is None:
        return {"logits": _call(i, slice(None))}
    step = i.graphs.step(i.rows, i.tokens.flatten().tolist() if not i.started else None)
    i.started = True
    return {"logits": step.logits}


def _decode_plainly(context: int, i: Serving) -> Outputs:
    """The same step by the readable ops, a few rows at a time: they copy the keys of a layer."""
    routes = Routes(i.model)
    with routes.recorded():
        _call(i, slice(None))
    # a mark of all states to return to would take as much memory as they do
    i.pool.count(i.rows, -1)
    _fill(i.pool, context)
    with routes.replayed(), ops.use_backend("torch"):
        pieces = [_call(i, slice(at, at + ROWS_AT_ONCE)) for at in range(0, len(i.rows), ROWS_AT_ONCE)]
    return {"logits": torch.cat(pieces)}


@torch.inference_mode()
def _call(i: Serving, rows: slice) -> Tensor:
    """Logits (rows, 1, vocab) of the newest tokens of some rows."""
    logits = i.model(i.tokens[rows], cache=i.pool.view(i.rows[rows]), logits="last").logits
    assert logits is not None, "the call asked for logits"
    return logits


def _decode_transformers(i: Serving) -> Outputs:
    """One step of transformers' model with its static cache, captured where there is a GPU.

    That cache attends to every place it has, so that a short prompt costs what a full context does. The states are not
    ours, hence no outputs.
    """
    if i.peer is None:
        i.peer = _transformers_step(i)
    i.peer()
    return {}


@torch.inference_mode()
def _transformers_step(i: Serving) -> Callable[[], object]:
    from transformers import StaticCache

    peer, tokens = peers.transformers_model(i.model).eval(), i.tokens.clone()
    held = StaticCache(config=peer.config, max_cache_len=i.pool.max_tokens)
    peer(input_ids=tokens.expand(-1, 4), past_key_values=held, use_cache=True)

    def step() -> object:
        with torch.inference_mode():
            return peer(input_ids=tokens, past_key_values=held, use_cache=True).logits

    if tokens.device.type == "cpu":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def step_bytes(context: int, i: Serving) -> float:
    """Bytes that a step must move: weights once, of routed experts those that were chosen; caches read, states written."""
    config, batch = i.model.config, len(i.rows)
    # a model in training mode tells which experts were chosen
    with torch.inference_mode():
        routers = i.model.train()(i.tokens, cache=i.pool.view(i.rows), logits=None).routers
    i.model.eval()
    routed = [mixer for mixer in sizes.backbone_mixers(config) if isinstance(mixer, MoEConfig)]
    unused = sum(
        int((router.counts == 0).sum()) * (2 + mixer.gated) * (mixer.latent or mixer.hidden) * mixer.ffn
        for mixer, router in zip(routed, routers, strict=True)
    )
    # of the input embedding only a row each
    table = 0 if config.tie_embeddings else sizes.embedding_parameters(config)
    weights = sizes.weight_bytes(config, mtp=False) - 2 * (unused + table)
    carried = sizes.state_bytes(config, batch) + sizes.conv_bytes(config, batch)
    return weights + sizes.kv_bytes(config, batch, context) + 2 * carried


def _draw_prompt(name: str, tokens: int) -> Serving:
    i = _serving(name, 1, tokens)
    return replace(i, tokens=torch.randint(0, i.model.config.vocab, (1, tokens)))


def _prompt(chunk: int, i: Serving) -> Outputs:
    """The prompt of one sequence in an empty cache; logits of its last token."""
    i.pool.close(i.rows)
    i.rows = i.pool.open(1)
    found: Outputs = {}
    with torch.inference_mode():
        for piece in i.tokens.split(chunk, 1):
            last = piece.shape[1] < chunk or i.pool.held[i.rows[0]] + chunk == i.tokens.shape[1]
            logits = i.model(piece, cache=i.pool.view(i.rows), logits="last" if last else None).logits
            found = {} if logits is None else {"logits": logits}
    return found


def _prompt_again(chunk: int, other: int | None, i: Serving) -> Outputs:
    """The same in chunks of `other` tokens; None: in one, by the plain ops."""
    routes = Routes(i.model)
    with routes.recorded():
        _prompt(chunk, i)
    with routes.replayed(), ops.use_backend("torch") if other is None else nullcontext():
        return _prompt(other or i.tokens.shape[1], i)


def draw_training(config: Any, dtype: torch.dtype, precision: Precision, rows: int, seq: int) -> Training:
    """A new model, its optimizer, and random tokens."""
    model = build(config, torch.get_default_device(), dtype).train()
    tokens = torch.randint(0, config.vocab, (rows, seq + 1))
    return Training(model, Optimizers(model, "adamw", lr=1e-4), tokens, precision)


def train(i: Training) -> Outputs:
    """One optimizer step; the loss before it."""
    with compute_in(i.precision, i.tokens.device):
        hidden = i.model(i.tokens[:, :-1], logits=None).last_hidden
        loss = linear_cross_entropy(hidden, i.model.head.weight, i.tokens[:, 1:]) / i.tokens[:, 1:].numel()
    loss.backward()
    gradients = [p.grad for p in i.model.parameters() if p.grad is not None]
    # the one wait for the device, as in the training loop
    clip_gradients(gradients, gradient_norm(gradients).item(), 1.0)
    i.optimizer.step()
    return {"loss": loss.detach()}


def loss_in_fp32(i: Training) -> Outputs:
    """The loss of the same weights in fp32 by the readable ops, row by row."""
    model = i.model.float()
    with ops.use_backend("torch"), torch.no_grad():
        sums = [
            linear_cross_entropy(model(row[None, :-1], logits=None).last_hidden, model.head.weight, row[None, 1:])
            for row in i.tokens
        ]
    return {"loss": torch.stack(sums).sum() / i.tokens[:, 1:].numel()}


def train_transformers(i: Training) -> Outputs:
    """The same step by transformers' model, which takes the place of ours; logits in one piece, as its users have them."""
    if i.peer is None:
        i.peer = peers.transformers_model(i.model).train()
        i.model.to("meta")
        i.optimizer = torch.optim.AdamW(i.peer.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    logits = i.peer(input_ids=i.tokens[:, :-1], use_cache=False).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), i.tokens[:, 1:].flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(i.peer.parameters(), 1.0)
    i.optimizer.step()
    i.optimizer.zero_grad()
    return {"loss": loss.detach()}
