"""Other packages that compute the same things, with the signatures of `alloy.ops`. None is ever needed; each is imported
when it is called, and reported as absent where it is not installed.

docs/performance.md says how to get them.
"""

# pyright: reportMissingImports=false

import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alloy import ops
from alloy.bench.case import PEERS
from alloy.models.base import CausalLM
from alloy.models.hf.config import write_config
from alloy.models.hf.folder import model_tensors
from alloy.models.hf.names import bare_name, hub_name


def peer_of(label: str) -> str:
    """The peer that a label such as "mamba-ssm/c256" belongs to."""
    return label.split("/")[0]


def version(label: str) -> str | None:
    """Version of the installed peer; None: absent."""
    module = PEERS[peer_of(label)].module
    if importlib.util.find_spec(module) is None:
        return None
    found = getattr(importlib.import_module(module), "__version__", None)
    return found or importlib.metadata.version(module.replace("_", "-"))


def plain(op: Callable[..., Any]) -> Callable[..., Any]:
    """`op` computed by the readable reference: the peer "torch"."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with ops.use_backend("torch"):
            return op(*args, **kwargs)

    return run


def mamba_scan(chunk: int) -> Callable[..., Tensor]:
    """As `alloy.ops.ssd_scan`, by mamba-ssm with chunks of `chunk` tokens."""

    def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, **options: Any) -> Tensor:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        return mamba_chunk_scan_combined(
            x, dt, A, B, C, chunk, D, dt_bias=options["dt_bias"], dt_softplus=True, seq_idx=options.get("documents")
        )

    return scan


def fla_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, dt_bias: Tensor, **_: Any) -> Tensor:
    """As `alloy.ops.ssd_scan`, by fla's gated linear attention: groups, dt and D, which it lacks, are computed around it."""
    from fla.ops.simple_gla import chunk_simple_gla

    step = F.softplus(dt.float() + dt_bias)
    repeats = x.shape[2] // B.shape[2]
    query, key = (t.repeat_interleave(repeats, 2) for t in (C, B))
    y, _state = chunk_simple_gla(query, key, x * step[..., None].to(x.dtype), step * A, scale=1.0)
    return y + D[:, None].to(x.dtype) * x


def mamba_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, dt_bias: Tensor
) -> Tensor:
    """As `alloy.ops.ssd_step`, by mamba-ssm."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    _, heads, head_dim, width = state.shape
    return selective_state_update(
        state,
        x,
        dt[..., None].expand(-1, -1, head_dim),
        A[:, None, None].expand(heads, head_dim, width),
        B,
        C,
        D[:, None].expand(heads, head_dim),
        dt_bias=dt_bias[:, None].expand(heads, head_dim),
        dt_softplus=True,
    )


def cuda_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As `alloy.ops.causal_conv1d`, by causal-conv1d; channels last."""
    from causal_conv1d import causal_conv1d_fn

    return causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)


def cuda_conv_step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As `alloy.ops.causal_conv1d_step`, by causal-conv1d, whose state may be as short as ours."""
    from causal_conv1d import causal_conv1d_update

    return causal_conv1d_update(x, state, weight, bias, activation="silu")


def fla_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As `alloy.ops.causal_conv1d`, by fla."""
    from fla.modules.causal_conv1d import causal_conv1d

    return causal_conv1d(x, weight, bias, activation="silu")[0]


def torch_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As `alloy.ops.causal_conv1d`, by PyTorch's grouped convolution."""
    channels, kernel = weight.shape
    padded = F.pad(x.transpose(1, 2), (kernel - 1, 0))
    return F.silu(F.conv1d(padded, weight[:, None], bias, groups=channels)).transpose(1, 2)


def transformers_experts(implementation: str) -> Callable[..., Tensor]:
    """As `alloy.ops.moe_experts`, by transformers' NemotronH experts: "eager", "batched_mm" or "grouped_mm"."""

    def run(x: Tensor, chosen: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        from transformers import NemotronHConfig
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

        num_experts, ffn, width = up.shape
        config = NemotronHConfig(
            n_routed_experts=num_experts, moe_intermediate_size=ffn, hidden_size=width, mlp_hidden_act="relu2"
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            experts = NemotronHExperts(config)
        # parameters that are views of ours, and carry their gradients
        for name, tensor in (("up_proj", up), ("down_proj", down)):
            delattr(experts, name)
            setattr(experts, name, tensor)
        return experts(x, chosen, weights)

    return run


def liger_linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As `linear_cross_entropy`, by Liger: hidden (tokens, hidden), weight (vocab, hidden), labels (tokens,)."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    function: Any = LigerFusedLinearCrossEntropyFunction
    result = function.apply(hidden, weight, labels, None, None, -100, 0.0, 0.0, "sum")
    return result[0] if isinstance(result, tuple) else result


def torch_linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As `linear_cross_entropy` with all logits in fp32: hidden (tokens, hidden), weight (vocab, hidden), labels (tokens,)."""
    logits = hidden @ weight.T
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")


def liger_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `alloy.ops.rms_norm`, by Liger."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    function: Any = LigerRMSNormFunction
    return function.apply(x, weight, eps, 0.0, "llama", False)


def mamba_gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, group_size: int) -> Tensor:
    """As `alloy.ops.gated_rms_norm`, by mamba-ssm."""
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    return rmsnorm_fn(x, weight, None, gate, eps, group_size, norm_before_gate=False)


def transformers_model(model: CausalLM) -> Any:
    """transformers' model of the same configuration on the same device, with the same tensors as weights."""
    import transformers

    data = write_config(model.config)
    config = transformers.CONFIG_MAPPING[data.pop("model_type")](**data)
    with torch.device("meta"):
        peer = transformers.AutoModelForCausalLM.from_config(config, dtype=model.embed.weight.dtype)
    # transformers keeps the experts of a layer in one tensor, without ".weight"
    ours = {
        bare_name(hub_name(key, model.config)).replace(".{expert}", ""): tensor.detach()
        for key, tensor in model_tensors(model, model.config).items()
    }
    found: dict[str, Tensor] = {}
    for name, wanted in peer.state_dict().items():
        bare = bare_name(name)
        found[name] = (ours[bare] if bare in ours else ours[f"{bare}.weight"]).view(wanted.shape)
    peer.load_state_dict(found, assign=True)
    for module in list(peer.modules()):
        # tables of angles are no part of a checkpoint
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            with torch.device(model.embed.weight.device):
                module.__init__(config)
    return peer
