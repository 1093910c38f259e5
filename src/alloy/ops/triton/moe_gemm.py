# pyright: basic, reportAttributeAccessIssue=false, reportIndexIssue=false, reportMissingModuleSource=false
"""Matrix products of the sorted pairs of `moe_plan`, each expert's rows with that expert's matrix.

Every kernel is a fixed number of programs that walk over tiles; how many there are, and of which experts, is read from the
plan. Tiles of one expert follow each other, those that share a stretch of its matrix first, so that both operands are found
in the L2. The activation is taken before a product is stored.

Legend: F ffn, D width; BM x BN is a tile of the product, BK the stretch of a step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from alloy.ops.triton import tuning
from alloy.ops.triton.elementary import power_of_2
from alloy.ops.triton.moe_plan import Plan, gather

_CONFIG = ("BN", "BK", "FLATTEN", "SORTED", "per_sm", "num_warps", "num_stages")


def _configs(*rows: tuple[int, ...]) -> list[dict[str, int]]:
    return [dict(zip(_CONFIG, row, strict=True)) for row in rows]


# rows of a tile are the plan's block: 16 where matrices are what is read, 128 where products are what takes time
tuning.register("moe_gemm_fp32", *_configs((64, 16, 0, 0, 4, 4, 2)))
tuning.register("moe_gemm_16", *_configs((64, 128, 0, 0, 2, 4, 4)))
tuning.register("moe_gemm_64", *_configs((128, 64, 0, 1, 2, 4, 4), (256, 64, 1, 1, 1, 8, 4)))
tuning.register("moe_gemm_128", *_configs((128, 64, 1, 1, 2, 4, 3), (256, 64, 1, 1, 1, 8, 3)))
# here a tile of the product is BM x BN of an expert's matrix, and BK are rows
tuning.register(
    "moe_wgrad_fp32", {"BM": 64, "BN": 64, "BK": 16, "FLATTEN": 0, "per_sm": 4, "num_warps": 4, "num_stages": 2}
)
tuning.register(
    "moe_wgrad", {"BM": 128, "BN": 128, "BK": 64, "FLATTEN": 1, "per_sm": 2, "num_warps": 4, "num_stages": 3}
)


def block_rows(pairs: int, num_experts: int, dtype: torch.dtype) -> int:
    """Rows of a plan's block: near what an expert has on average, in three steps."""
    mean = pairs / num_experts
    if mean <= 10:
        return 16
    return 64 if mean <= 64 or dtype == torch.float32 else 128


def align_rows(x: Tensor) -> int:
    """What an expert's share of the rows of x (tokens, width) is a multiple of, for `weight_gradient`: its step."""
    return 16 if x.dtype == torch.float32 else 64


def gemm_config(plan_block: int, x: Tensor, shape: tuple[int, int], use: str) -> dict[str, int]:
    """The configuration of a product of x's kind (any shape) with matrices of `shape` (outputs, inputs)."""
    op = "moe_gemm_fp32" if x.dtype == torch.float32 else f"moe_gemm_{plan_block}"
    config = dict(tuning.pick(op, f"{use}_{shape[0]}x{shape[1]}"))
    if use != "up" and use != "gated":
        del config["SORTED"]
    return config


def programs(device: torch.device, per_sm: int) -> int:
    """How many programs walk over the tiles."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count * per_sm


def rows_of(x: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """x (..., width), contiguous, as a matrix of tiles (rows, cols)."""
    flat = x.view(-1, x.shape[-1])
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [rows, cols])


def up_product(
    x: Tensor, plan: Plan, block: int, top_k: int, up: Tensor, gate: Tensor | None, activation: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """act(up x), or act(gate x) * up x with `gate`, of x's tokens: (rows, F); with `keep` also up x and gate x, else empty."""
    experts, ffn, width = up.shape
    rows = plan.order.numel()
    config = gemm_config(block, x, (ffn, width), "up" if gate is None else "gated")
    per_sm, bn, bk = config.pop("per_sm"), config["BN"], config["BK"]
    lying = gather(x, plan, top_k) if config["SORTED"] else x
    if gate is not None:
        bn = config["BN"] = max(32, bn // 2)
    out = x.new_empty(rows, ffn)
    inner = x.new_empty((rows, ffn) if keep else 0)
    opened = x.new_empty((rows, ffn) if keep and gate is not None else 0)
    up_kernel[(programs(x.device, per_sm),)](
        rows_of(lying, block, bk) if config["SORTED"] else lying,
        rows_of(up, bn, bk),
        None if gate is None else rows_of(gate, bn, bk),
        out,
        inner,
        opened,
        plan.order,
        plan.starts,
        plan.block_starts,
        plan.blocks,
        experts,
        ffn,
        width,
        x.stride(0),
        top_k,
        BM=block,
        ACTIVATION=activation,
        KEEP=keep,
        PRECISION=_precision(x),
        **config,
    )
    return out, inner, opened


def product(
    rows: Tensor,
    matrices: Tensor,
    plan: Plan,
    block: int,
    transposed: bool,
) -> Tensor:
    """rows (rows, k) times each row's expert of matrices (experts, m, k) if `transposed`, else (experts, k, m): (rows, m)."""
    experts = matrices.shape[0]
    outputs, inputs = matrices.shape[1:] if transposed else (matrices.shape[2], matrices.shape[1])
    config = gemm_config(block, rows, (outputs, inputs), "down" if transposed else "dx")
    per_sm, bn, bk = config.pop("per_sm"), config["BN"], config["BK"]
    tile = (bn, bk) if transposed else (bk, bn)
    out = rows.new_empty(rows.shape[0], outputs)
    product_kernel[(programs(rows.device, per_sm),)](
        rows_of(rows, block, bk),
        rows_of(matrices, *tile),
        out,
        plan.starts,
        plan.block_starts,
        plan.blocks,
        experts,
        outputs,
        inputs,
        BM=block,
        TRANSPOSED=transposed,
        PRECISION=_precision(rows),
        **config,
    )
    return out


def hidden_gradients(
    dhidden: Tensor, inner: Tensor, opened: Tensor, weights: Tensor, plan: Plan, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Through the routing weight and the activation; dhidden (rows, F) is down^T dy of each pair, and is overwritten.

    Returns:
        gradient of up x (rows, F); of gate x (rows, F), or empty; weight * hidden (rows, F), what `down`'s gradient is
        made of; gradient of the routing weights fp32, as weights (tokens, top_k)
    """
    rows, ffn = dhidden.shape
    hidden, dopened, dweights = torch.empty_like(inner), torch.empty_like(opened), torch.empty_like(weights)
    hidden_gradients_kernel[(rows,)](
        dhidden,
        inner,
        opened if opened.numel() else None,
        weights,
        dopened,
        hidden,
        dweights,
        plan.order,
        plan.starts,
        plan.starts.numel() - 1,
        F=ffn,
        ACTIVATION=activation,
        WIDTH=min(2048, power_of_2(ffn)),
        num_warps=8,
    )
    return dhidden, dopened, hidden, dweights


def weight_gradient(left: Tensor, right: Tensor, plan: Plan, like: Tensor) -> Tensor:
    """Sum over an expert's rows of left (rows, m) outer right (rows, k): like (experts, m, k); zero where it has none.

    The plan is aligned to `align_rows`, and rows without a pair are zero in `left`.
    """
    op = "moe_wgrad_fp32" if left.dtype == torch.float32 else "moe_wgrad"
    config = dict(tuning.pick(op, f"{like.shape[1]}x{like.shape[2]}"))
    per_sm, bk = config.pop("per_sm"), config["BK"]
    out = torch.empty_like(like)
    weight_gradient_kernel[(programs(left.device, per_sm),)](
        rows_of(left, bk, config["BM"]),
        rows_of(right, bk, config["BN"]),
        out,
        plan.starts,
        *like.shape,
        PRECISION=_precision(left),
        **config,
    )
    return out


def _precision(x: Tensor) -> str:
    """fp32 stays fp32; 16-bit operands have one way."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


@triton.jit
def act(x, ACTIVATION: tl.constexpr):
    """An activation of `alloy.ops.activation`, in fp32."""
    if ACTIVATION == "relu2":
        y = tl.where(x < 0, 0.0, x * x)
    elif ACTIVATION == "relu":
        y = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "silu":
        y = x / (1 + tl.exp(-x))
    else:
        tl.static_assert(ACTIVATION == "gelu")
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    return y


@triton.jit
def act_slope(x, ACTIVATION: tl.constexpr):
    """Its derivative."""
    if ACTIVATION == "relu2":
        y = tl.where(x < 0, 0.0, 2 * x)
    elif ACTIVATION == "relu":
        y = tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == "silu":
        s = 1 / (1 + tl.exp(-x))
        y = s * (1 + x * (1 - s))
    else:
        tl.static_assert(ACTIVATION == "gelu")
        y = 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    return y


@triton.jit
def find_tile(tile, starts, block_starts, blocks, NT, BM: tl.constexpr):
    """Expert, first row, row past the expert's last, and column block of a tile."""
    expert = tl.load(blocks + tile // NT)
    first_block = tl.load(block_starts + expert)
    num_blocks = tl.load(block_starts + expert + 1) - first_block
    tile -= first_block * NT
    row = tl.load(starts + expert) + (tile % num_blocks) * BM
    return expert, row, tl.load(starts + expert + 1), tile // num_blocks


@triton.jit
def up_kernel(
    x,
    up,
    gate,
    out,
    inner,
    opened,
    order,
    starts,
    block_starts,
    blocks,
    experts,
    F,
    D,
    stride_x,
    top_k,
    BM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    FLATTEN: tl.constexpr,
    SORTED: tl.constexpr,
):
    """Tiles of act(up x); x's rows are fetched through `order`, or lie sorted already."""
    NT = tl.cdiv(F, BN)
    total = tl.load(block_starts + experts) * NT
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=FLATTEN):
        expert, first, stop, n = find_tile(tile, starts, block_starts, blocks, NT, BM)
        rows = first + tl.arange(0, BM)
        token = rows
        if not SORTED:
            token = (tl.maximum(tl.load(order + rows, mask=rows < stop, other=0), 0) // top_k).to(tl.int64)
        acc = tl.zeros((BM, BN), tl.float32)
        acc_gate = tl.zeros((BM, BN), tl.float32)
        for k in range(0, D, BK):
            if SORTED:
                a = x.load([first, k])
            else:
                at = k + tl.arange(0, BK)
                a = tl.load(x + token[:, None] * stride_x + at[None, :], mask=(at < D)[None, :], other=0)
            acc = tl.dot(a, up.load([expert * F + n * BN, k]).T, acc, input_precision=PRECISION)
            if gate is not None:
                acc_gate = tl.dot(a, gate.load([expert * F + n * BN, k]).T, acc_gate, input_precision=PRECISION)
        cols = n * BN + tl.arange(0, BN)
        at = rows.to(tl.int64)[:, None] * F + cols[None, :]
        inside = (rows < stop)[:, None] & (cols < F)[None, :]
        kind = out.dtype.element_ty
        if KEEP:
            tl.store(inner + at, acc.to(kind), mask=inside)
        if gate is not None:
            if KEEP:
                tl.store(opened + at, acc_gate.to(kind), mask=inside)
            acc = act(acc_gate, ACTIVATION) * acc
        else:
            acc = act(acc, ACTIVATION)
        tl.store(out + at, acc.to(kind), mask=inside)


@triton.jit
def product_kernel(
    a,
    w,
    out,
    starts,
    block_starts,
    blocks,
    experts,
    N,
    K,
    BM: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """Tiles of a w; a tile of `a` may reach into the next expert's rows, whose products are not stored."""
    NT = tl.cdiv(N, BN)
    total = tl.load(block_starts + experts) * NT
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=FLATTEN):
        expert, first, stop, n = find_tile(tile, starts, block_starts, blocks, NT, BM)
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            if TRANSPOSED:
                acc = tl.dot(a.load([first, k]), w.load([expert * N + n * BN, k]).T, acc, input_precision=PRECISION)
            else:
                acc = tl.dot(a.load([first, k]), w.load([expert * K + k, n * BN]), acc, input_precision=PRECISION)
        rows = first + tl.arange(0, BM)
        cols = n * BN + tl.arange(0, BN)
        inside = (rows < stop)[:, None] & (cols < N)[None, :]
        tl.store(out + rows.to(tl.int64)[:, None] * N + cols[None, :], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def hidden_gradients_kernel(
    dhidden,
    inner,
    opened,
    weights,
    dopened,
    hidden,
    dweights,
    order,
    starts,
    experts,
    F: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row; rows that fill up an expert's share have no pair, and become zero."""
    row = tl.program_id(0)
    if row < tl.load(starts + experts):
        pair = tl.load(order + row)
        weight = tl.load(weights + pair, mask=pair >= 0, other=0).to(tl.float32)
        kind = hidden.dtype.element_ty
        total = tl.zeros((WIDTH,), tl.float32)
        for first in tl.static_range(0, F, WIDTH):
            at = first + tl.arange(0, WIDTH)
            inside = at < F
            at += row.to(tl.int64) * F
            gradient = tl.load(dhidden + at, mask=inside, other=0).to(tl.float32)
            before = tl.load(inner + at, mask=inside, other=0).to(tl.float32)
            if opened is not None:
                open_before = tl.load(opened + at, mask=inside, other=0).to(tl.float32)
                open_after = act(open_before, ACTIVATION)
                value = open_after * before
                through = weight * gradient * before * act_slope(open_before, ACTIVATION)
                tl.store(dopened + at, through.to(kind), mask=inside)
                tl.store(dhidden + at, (weight * gradient * open_after).to(kind), mask=inside)
            else:
                value = act(before, ACTIVATION)
                tl.store(dhidden + at, (weight * gradient * act_slope(before, ACTIVATION)).to(kind), mask=inside)
            tl.store(hidden + at, (weight * value).to(kind), mask=inside)
            total += gradient * value
        tl.store(dweights + pair, tl.sum(total, 0), mask=pair >= 0)


@triton.jit
def weight_gradient_kernel(
    left,
    right,
    out,
    starts,
    experts,
    M,
    N,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """Tiles of left^T right over each expert's rows, which are whole steps."""
    MT = tl.cdiv(M, BM)
    NT = tl.cdiv(N, BN)
    total = experts * MT * NT
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=FLATTEN):
        expert = tile // (MT * NT)
        m = (tile % MT) * BM
        n = (tile // MT % NT) * BN
        first = tl.load(starts + expert)
        stop = tl.load(starts + expert + 1)
        acc = tl.zeros((BM, BN), tl.float32)
        for row in range(first, stop, BK):
            acc = tl.dot(left.load([row, m]).T, right.load([row, n]), acc, input_precision=PRECISION)
        rows = m + tl.arange(0, BM)
        cols = n + tl.arange(0, BN)
        inside = (rows < M)[:, None] & (cols < N)[None, :]
        at = (expert.to(tl.int64) * M + rows[:, None]) * N + cols[None, :]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)
