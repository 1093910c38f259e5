"""A derivation of the models apart from the package: one row, one token after another, plain loops, float64.

Reads only weights (by their names) and the fields of the config; hybrid-models.md sections 5 to 7 are its source.
nemotron-nas is put together from transformers' Llama sub-modules.
"""

import math

import torch
from torch import Tensor

from alloy.models.configs import DecoderConfig, HybridConfig

Weights = dict[str, Tensor]


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def relu2(x: Tensor) -> Tensor:
    return x.clamp(min=0) ** 2


def mamba(x: Tensor, w: Weights, field, eps: float) -> Tensor:
    """x (seq, hidden): the recurrence, one token and one head at a time."""
    heads, width, state, groups = (field(n) for n in ("ssm_heads", "ssm_head_dim", "ssm_state", "ssm_groups"))
    inner, kernel = heads * width, field("conv_kernel")
    low, high = field("time_step_limit")
    projected = x @ w["in_proj.weight"].T
    z, xbc, dt_raw = projected[:, :inner], projected[:, inner:-heads], projected[:, -heads:]
    S = torch.zeros(heads, width, state, dtype=x.dtype)
    rows = []
    for t in range(len(x)):
        conv = torch.zeros(xbc.shape[1], dtype=x.dtype)
        for k in range(kernel):
            if t - k >= 0:
                conv = conv + w["conv.weight"][:, kernel - 1 - k] * xbc[t - k]
        if "conv.bias" in w:
            conv = conv + w["conv.bias"]
        conv = conv / (1 + torch.exp(-conv))
        xs = conv[:inner].view(heads, width)
        B = conv[inner : inner + groups * state].view(groups, state)
        C = conv[inner + groups * state :].view(groups, state)
        y = torch.zeros(heads, width, dtype=x.dtype)
        for h in range(heads):
            g = h * groups // heads
            dt = torch.log1p(torch.exp(dt_raw[t, h] + w["dt_bias"][h])).clamp(low, high)
            S[h] = torch.exp(-dt * torch.exp(w["A_log"][h])) * S[h] + dt * torch.outer(xs[h], B[g])
            y[h] = S[h] @ C[g] + w["D"][h] * xs[h]
        gated = y.flatten() * z[t] / (1 + torch.exp(-z[t]))
        parts = [rms(part, torch.ones(1, dtype=x.dtype), eps) for part in gated.view(groups, -1)]
        rows.append(torch.cat(parts) * w["norm.weight"])
    return torch.stack(rows) @ w["out_proj.weight"].T


def attention(x: Tensor, w: Weights, field) -> Tensor:
    heads, kv_heads, dim, window = (field(n) for n in ("num_heads", "num_kv_heads", "head_dim", "window"))
    q = (x @ w["q_proj.weight"].T).view(-1, heads, dim)
    k = (x @ w["k_proj.weight"].T).view(-1, kv_heads, dim)
    v = (x @ w["v_proj.weight"].T).view(-1, kv_heads, dim)
    rows = []
    for t in range(len(x)):
        first = 0 if window is None else max(0, t - window + 1)
        outs = []
        for h in range(heads):
            g = h // (heads // kv_heads)
            p = (k[first : t + 1, g] @ q[t, h] / math.sqrt(dim)).softmax(0)
            outs.append(p @ v[first : t + 1, g])
        rows.append(torch.cat(outs))
    return torch.stack(rows) @ w["o_proj.weight"].T


def moe(x: Tensor, w: Weights, field, config: HybridConfig) -> Tensor:
    experts, top_k, latent = field("num_experts"), field("top_k"), field("latent")
    groups, kept = config.num_router_groups, config.top_router_groups
    rows = []
    for token in x:
        scores = torch.sigmoid(w["gate.weight"] @ token)
        choice = (scores + w["gate.bias"]).tolist()
        size = experts // groups
        ranked = sorted(range(groups), key=lambda g: -sum(sorted(choice[g * size : (g + 1) * size])[-2:]))
        allowed = [e for g in ranked[:kept] for e in range(g * size, (g + 1) * size)]
        chosen = sorted(allowed, key=lambda e: -choice[e])[:top_k]
        weight = scores[chosen]
        if config.normalize_weights:
            weight = weight / (weight.sum() + 1e-20)
        inner = w["latent_in.weight"] @ token if latent else token
        y = sum(
            p * config.router_scale * (w["experts.down"][e] @ relu2(w["experts.up"][e] @ inner))
            for p, e in zip(weight, chosen, strict=True)
        )
        y = w["latent_out.weight"] @ y if latent else y
        if field("shared_ffn"):
            y = y + w["shared.down_proj.weight"] @ relu2(w["shared.up_proj.weight"] @ token)
        rows.append(y)
    return torch.stack(rows)


def blocks(h: Tensor, weights: Weights, prefix: str, pattern: str, overrides, config: HybridConfig) -> list[Tensor]:
    """The residual stream (seq, hidden) after each block."""
    stream = []
    for i, symbol in enumerate(pattern):
        w = part(weights, f"{prefix}layers.{i}.")
        m = part(w, "mixer.")

        def field(name: str, i: int = i):
            own = getattr(overrides[i], name, None) if overrides else None
            return getattr(config, name) if own is None else own

        x = rms(h, w["norm.weight"], config.norm_eps)
        if symbol == "M":
            y = mamba(x, m, field, config.norm_eps)
        elif symbol == "*":
            y = attention(x, m, field)
        elif symbol == "-":
            y = relu2(x @ m["up_proj.weight"].T) @ m["down_proj.weight"].T
        else:
            y = moe(x, m, field, config)
        h = h + y
        stream.append(h)
    return stream


def hybrid(config: HybridConfig, weights: Weights, tokens: Tensor, depths: int = 0) -> dict[str, list[Tensor]]:
    """One row: tokens (seq,) -> hidden (one per block), logits, and MTP logits of `depths` depths."""
    weights = {k: v.double() for k, v in weights.items()}
    embed, head = weights["embed.weight"], weights["head.weight"]
    stream = blocks(embed[tokens], weights, "", config.pattern, config.layers, config)
    h = rms(stream[-1], weights["norm.weight"], config.norm_eps)
    result = {"hidden": stream, "logits": [h @ head.T], "mtp": []}
    for k in range(1, depths + 1):
        w = part(weights, f"mtp.{min(k, config.mtp_depths) - 1}.")
        h = h[: len(tokens) - k]
        e = rms(embed[tokens[k:]], w["enorm.weight"], config.norm_eps)
        x = torch.cat([e, rms(h, w["hnorm.weight"], config.norm_eps)], -1) @ w["eh_proj.weight"].T
        x = blocks(x, w, "", config.mtp_pattern, config.mtp_layers, config)[-1]
        h = rms(x, w["final_norm.weight"], config.norm_eps)
        result["mtp"].append(h @ head.T)
    return result


def nas(config: DecoderConfig, weights: Weights, tokens: Tensor) -> Tensor:
    """One row: tokens (seq,) -> logits, from transformers' Llama parts."""
    from transformers import LlamaConfig
    from transformers.models.llama import modeling_llama as llama

    h = weights["embed.weight"][tokens][None]
    seq = len(tokens)
    mask = torch.full((seq, seq), -math.inf).triu(1)[None, None]
    for i, layer in enumerate(config.layers or ()):
        w = part(weights, f"layers.{i}.")
        if "attention.linear.weight" in w:
            h = h + llama_norm(h, w["attention_norm.weight"], config) @ w["attention.linear.weight"].T
        elif layer.attention is not None:
            a = layer.attention
            rope = a.rope
            assert rope is not None
            llama_config = LlamaConfig(
                hidden_size=config.hidden,
                num_attention_heads=a.num_heads,
                num_key_value_heads=a.num_kv_heads,
                head_dim=a.head_dim,
                rope_parameters={
                    "rope_type": "llama3",
                    "rope_theta": rope.theta,
                    "factor": rope.factor,
                    "low_freq_factor": rope.low_freq_factor,
                    "high_freq_factor": rope.high_freq_factor,
                    "original_max_position_embeddings": rope.original_max_positions,
                },
            )
            llama_config._attn_implementation = "eager"
            module = llama.LlamaAttention(llama_config, 0)
            module.load_state_dict(part(w, "attention."))
            angles = llama.LlamaRotaryEmbedding(llama_config)(h, torch.arange(seq)[None])
            h = h + module(llama_norm(h, w["attention_norm.weight"], config), angles, mask)[0]
        if "mlp.linear.weight" in w:
            h = h + llama_norm(h, w["mlp_norm.weight"], config) @ w["mlp.linear.weight"].T + w["mlp.linear.bias"]
        elif layer.mlp is not None:
            width = w["mlp.up_proj.weight"].shape[0]
            module = llama.LlamaMLP(
                LlamaConfig(hidden_size=config.hidden, intermediate_size=width, num_attention_heads=1)
            )
            module.load_state_dict(part(w, "mlp."))
            h = h + module(llama_norm(h, w["mlp_norm.weight"], config))
    return (llama_norm(h, weights["norm.weight"], config) @ weights["head.weight"].T)[0]


def llama_norm(x: Tensor, weight: Tensor, config: DecoderConfig) -> Tensor:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(config.hidden, config.norm_eps)
    norm.load_state_dict({"weight": weight})
    return norm(x)


def part(weights: Weights, prefix: str) -> Weights:
    return {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}
