"""The Mamba-2 mixer: projection, short convolution, selective state space, gated norm, projection.

Shapes: inner = heads * head_dim, channels = inner + 2 * groups * state. in_proj's rows are z (inner), x (inner),
B (groups * state), C (groups * state), dt (heads); the convolution runs over x, B and C.

Paper: Transformers are SSMs (Dao and Gu, 2024), arXiv:2405.21060; layout hybrid-models.md section 5.4.
Differs: dt is clamped by time_step_limit in prefill and decode alike, which transformers 5.23 does not.
"""

import math
from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from alloy.models.base import InitPlan, Layout, keep_fp32
from alloy.models.blocks import Linear
from alloy.models.cache import Cache, MambaDraft
from alloy.models.configs import MambaConfig
from alloy.ops.conv import causal_conv1d, causal_conv1d_multi
from alloy.ops.mamba_scan import mamba_scan, split
from alloy.ops.mamba_step import mamba_step
from alloy.ops.norm import gated_rms_norm
from alloy.ops.ssd import ssd_scan, ssd_step_multi

# of a tensor: where it lies, and how often it was changed in place, where that is counted
Version = tuple[int, int | None]


class ConvWeight(nn.Module):
    """Weights of the depthwise convolution: weight (channels, kernel), bias (channels,) or None."""

    def __init__(self, config: MambaConfig, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        shape = (config.channels, config.conv_kernel)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        bias = torch.empty(config.channels, device=device, dtype=dtype) if config.conv_bias else None
        self.bias = None if bias is None else nn.Parameter(bias)

    def draw_weights(self, plan: InitPlan) -> None:
        """U(+-1/sqrt(kernel)); transformers: normal weights, zero bias."""
        bound = self.weight.shape[1] ** -0.5
        if plan.style == "transformers":
            plan.normal(self.weight)
        else:
            plan.uniform(self.weight, -bound, bound)
        if self.bias is not None and plan.style == "transformers":
            self.bias.zero_()
        elif self.bias is not None:
            plan.uniform(self.bias, -bound, bound)


class GateNorm(nn.Module):
    """Weight of the gated norm, (inner,)."""

    def __init__(self, width: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, device=device, dtype=dtype))

    def draw_weights(self, plan: InitPlan) -> None:
        """Ones."""
        self.weight.fill_(1.0)


class Mamba(nn.Module):
    """One Mamba-2 mixer; `layer` is its index in the cache.

    `prefill_limit` and `decode_limit` clamp dt; both are the config's time_step_limit unless the model is asked to
    reproduce another library (`HybridLM.compat`).
    """

    FP32 = ("dt_bias", "A_log", "D")

    def __init__(
        self,
        config: MambaConfig,
        layer: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.prefill_limit = self.decode_limit = config.time_step_limit
        self._held: Tensor | None = None
        self._held_version: Version = 0, None
        self._taps: Tensor | None = None
        self._taps_version: Version = 0, None
        width = config.inner + config.channels + config.heads
        self.in_proj = Linear(config.hidden, width, config.proj_bias, device=device, dtype=dtype)
        self.conv = ConvWeight(config, device, dtype)
        self.dt_bias = nn.Parameter(torch.empty(config.heads, device=device, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.empty(config.heads, device=device, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(config.heads, device=device, dtype=torch.float32))
        self.norm = GateNorm(config.inner, device, dtype)
        self.out_proj = Linear(config.inner, config.hidden, config.proj_bias, True, device=device, dtype=dtype)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor:
        """x (batch, seq, hidden) -> the same shape."""
        config = self.config
        projected = self.in_proj(x)
        if cache is not None and cache.longest and x.shape[1] == 1 and layout.lengths is None and not cache.is_drafting:
            return self.out_proj(self._step(projected[:, 0], cache)[:, None])
        z, xbc, dt = projected.split([config.inner, config.channels, config.heads], dim=-1)
        if cache is None:
            y = self._scan(xbc, dt, layout.documents)
        elif cache.is_drafting:
            y = self._draft(xbc, dt, cache)
        else:
            y = self._prefill(xbc, dt, layout, cache)
        y = gated_rms_norm(y.flatten(2), z, self.norm.weight, config.norm_eps, config.inner // config.groups)
        return self.out_proj(y)

    def held_rates(self) -> Tensor:
        """A, computed when A_log changed, and always in the same memory, which captured steps read."""
        version = _version(self.A_log)
        if self._held is None or version != self._held_version or version[1] is None:
            self._hold_rates()
            self._held_version = version
        return cast(Tensor, self._held)

    def draw_weights(self, plan: InitPlan) -> None:
        """A ~ U(1, 16), D = 1, dt log-uniform between the config's bounds; transformers: A = 1..heads."""
        config, device = self.config, self.D.device
        self.D.fill_(1.0)
        if plan.style == "transformers":
            self.A_log.copy_(torch.arange(1, config.heads + 1, device=device).log())
            # that library redraws this one matrix, with a fan-in of its own
            bound = 1 / math.sqrt(config.inner * plan.num_layers)
            plan.uniform(self.out_proj.weight, -bound, bound)
        else:
            plan.uniform(self.A_log, 1.0, 16.0)
            self.A_log.log_()
        low, high = plan.dt_range or (config.time_step_min, config.time_step_max)
        plan.uniform(self.dt_bias, math.log(low), math.log(high))
        dt = self.dt_bias.exp().clamp(min=config.time_step_floor)
        # the inverse of softplus, so that softplus(dt_bias) = dt
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        apply: Callable[..., Any] = super()._apply
        keep_fp32(self, self.FP32, lambda: apply(fn, recurse))
        # new memory may lie where the old did
        self._held_version = self._taps_version = 0, None
        return self

    def _split(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., channels) -> x (..., heads, head_dim), B and C (..., groups, state), views."""
        return split(xbc, self.config.inner, self.config.head_dim, self.config.groups)

    def _rates(self) -> Tensor:
        """A (heads,)."""
        return -self.A_log.float().exp()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _hold_rates(self) -> None:
        if self._held is None or self._held.device != self.A_log.device:
            self._held = self._rates()
        else:
            self._held.copy_(self._rates())

    def _held_taps(self) -> Tensor:
        """The convolution's weight (channels, kernel); on a CPU the channels of a tap lie side by side, as the step reads."""
        weight, version = self.conv.weight, _version(self.conv.weight)
        if weight.device.type != "cpu":
            return weight
        if self._taps is None or version != self._taps_version or version[1] is None:
            with torch.inference_mode(False), torch.no_grad():
                self._taps = weight.detach().t().contiguous().t()
            self._taps_version = version
        return self._taps

    def _scan(self, xbc: Tensor, dt: Tensor, documents: Tensor | None) -> Tensor:
        return mamba_scan(
            xbc,
            dt,
            self._rates(),
            self.D,
            self.dt_bias,
            self.conv.weight,
            self.conv.bias,
            head_dim=self.config.head_dim,
            groups=self.config.groups,
            dt_limit=self.prefill_limit,
            documents=documents,
        )

    def _prefill(self, xbc: Tensor, dt: Tensor, layout: Layout, cache: Cache) -> Tensor:
        # an empty cache holds zeros
        ssm, conv = cache.read(self.layer) if cache.longest else (None, None)
        xbc, taps = causal_conv1d(
            xbc,
            self.conv.weight,
            self.conv.bias,
            init=conv,
            documents=layout.documents,
            return_state=True,
        )
        x, B, C = self._split(xbc)
        y, state = ssd_scan(
            x,
            dt,
            self._rates(),
            B,
            C,
            self.D,
            dt_bias=self.dt_bias,
            dt_limit=self.prefill_limit,
            h0=None if ssm is None else ssm.float(),
            documents=layout.documents,
            return_state=True,
        )
        cache.write(self.layer, state, taps)
        return y

    def _step(self, projected: Tensor, cache: Cache) -> Tensor:
        """projected (batch, width of in_proj) -> (batch, inner)."""
        config = self.config
        return mamba_step(
            projected,
            cache.conv(self.layer),
            cache.ssm(self.layer),
            self._held_taps(),
            self.conv.bias,
            self.held_rates(),
            self.D,
            self.dt_bias,
            self.norm.weight,
            config.norm_eps,
            heads=config.heads,
            head_dim=config.head_dim,
            groups=config.groups,
            state=config.state,
            dt_limit=self.decode_limit,
            slots=cache.slots,
            sr_seed=cache.seed(self.layer),
        )

    def _draft(self, xbc: Tensor, dt: Tensor, cache: Cache) -> Tensor:
        inputs, slots, limit = xbc, cache.slots, self.decode_limit
        xbc = causal_conv1d_multi(cache.conv(self.layer), xbc, self.conv.weight, self.conv.bias, slots=slots)
        x, B, C = self._split(xbc)
        draft = MambaDraft(inputs, x, dt, self._rates(), B, C, self.dt_bias, limit)
        cache.drafts[self.layer] = draft
        return ssd_step_multi(
            cache.ssm(self.layer), x, dt, draft.A, B, C, self.D, dt_bias=self.dt_bias, dt_limit=limit, slots=slots
        )


def _version(x: Tensor) -> Version:
    """Differs when x (any shape) may have changed."""
    return x.data_ptr(), None if x.is_inference() else x._version
