"""Settings of `alloy serve` (serving.md section 1): `engine.*` for the engine, `serve.*` for the server."""

import math
from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from alloy.core.compose import compose_overrides
from alloy.core.explain import explain
from alloy.core.recipe import Config
from alloy.errors import RecipeError
from alloy.serve.tools import FORMATS

# names of sampling values that serve.default and generation_config.json may set
SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "max_tokens",
)  # fmt: skip


class EngineSettings(Config):
    """What the engine is built with; None: the engine's own default."""

    max_model_len: int | None = Field(None, ge=1)
    max_seqs: int | None = Field(None, ge=1)
    max_step_tokens: int | None = Field(None, ge=1)
    block_size: int | None = Field(None, ge=1)
    # a share of the device's free memory up to 1, or bytes
    memory: float | None = Field(None, gt=0)
    # expected prompt + answer, by which memory is split between blocks and slots
    plan_len: int | None = Field(None, ge=1)
    dtype: str | None = None
    device: str | None = None
    weights: str | None = None
    state_dtype: Literal["float32", "bfloat16", "float16", "float16-sr"] | None = None
    kv_dtype: str | None = None
    prefix_cache: bool | None = None
    checkpoint_every: int | None = Field(None, ge=1)
    speculate: int | Literal["auto"] | None = None
    cuda_graphs: bool | None = None

    @property
    def chosen(self) -> dict[str, Any]:
        """What was set, by name."""
        return self.model_dump(exclude_none=True)


class ServerSettings(Config):
    """Limits and habits of the server."""

    # waiting requests before 503; 0: no limit
    max_queue: int = Field(256, ge=0)
    # waiting prompt tokens before 503; 0: no limit
    max_queue_tokens: int = Field(524_288, ge=0)
    # wall clock of one request
    request_timeout_s: float = Field(600, gt=0)
    # an SSE comment when nothing was sent for so long
    keepalive_s: float = Field(15, gt=0)
    # time to finish after SIGTERM; 0: abort at once
    shutdown_s: float = Field(30, ge=0)
    max_body_mb: float = Field(16, gt=0)
    # a reader this many tokens behind for this long is cut off
    slow_reader_tokens: int = Field(1024, ge=1)
    slow_reader_s: float = Field(60, gt=0)
    # requests a minute for each key; 0: no limit
    rate_limit: int = Field(0, ge=0)
    # one key a line; read again on SIGHUP
    api_key_file: str | None = None
    # listen beyond this machine without a key
    insecure: bool = False
    cors: list[str] = Field(default_factory=list)
    page: bool = True
    metrics_auth: bool = False
    metrics_prefix: Literal["alloy", "vllm"] = "alloy"
    log_prompts: bool = False
    # let a request bring its own chat template
    trust_request_template: bool = False
    # how the model writes tool calls; None: as its chat template shows
    tool_format: str | None = None
    # sampling values of requests that set none, over those of generation_config.json
    default: dict[str, float] = Field(default_factory=dict)
    thinking_budget: int | None = Field(None, ge=0)
    max_thinking_budget: int | None = Field(None, ge=0)
    # stored answers of the responses API
    max_responses: int = Field(1000, ge=1)

    @model_validator(mode="after")
    def check(self) -> Self:
        """Names that must be known."""
        for name, value in self.default.items():
            if name not in SAMPLING:
                raise ValueError(f'serve.default has "{name}"; it takes {", ".join(SAMPLING)}')
            if not math.isfinite(value):
                raise ValueError(f"serve.default.{name} = {value} is not a finite number")
        if self.tool_format is not None and self.tool_format not in FORMATS:
            raise ValueError(f'serve.tool_format = "{self.tool_format}" is unknown; use one of {", ".join(FORMATS)}')
        return self


class Settings(Config):
    """Everything that key=value arguments can set."""

    engine: EngineSettings = EngineSettings()
    serve: ServerSettings = ServerSettings()


def read_settings(overrides: Sequence[str]) -> Settings:
    """Settings from "key=value" arguments."""
    composed = compose_overrides(overrides)
    try:
        return Settings.model_validate(composed.data)
    except ValidationError as error:
        raise RecipeError(explain(error, Settings, composed)) from error
