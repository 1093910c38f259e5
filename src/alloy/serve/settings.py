"""Settings of `alloy serve` (serving.md section 1): `engine.*` for the engine, `serve.*` for the server."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, FiniteFloat, ValidationError

from alloy.core.compose import compose_overrides
from alloy.core.explain import explain
from alloy.core.recipe import Config
from alloy.errors import RecipeError
from alloy.serve.tools import FormatName

# names of sampling values that serve.default and generation_config.json may set
Sampling = Literal[
    "temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "max_tokens"
]  # fmt: skip


class EngineSettings(Config):
    """What `alloy.LLM` is built with; None: its own default."""

    max_model_len: int | None = Field(default=None, ge=1)
    # None: 64 on a GPU, 16 on a CPU
    max_seqs: int | None = Field(default=None, ge=1)
    max_step_tokens: int | None = Field(default=None, ge=1)
    # GiB for keys, values and states
    memory: float | None = Field(default=None, gt=0)
    dtype: str | None = None
    device: str | None = None
    weights: str | None = None
    state_dtype: Literal["float32", "bfloat16", "float16", "float16-sr"] | None = None
    prefix_cache: bool | None = None
    checkpoint_every: int | None = Field(default=None, ge=1)
    speculate: int | Literal["auto"] | None = None
    cuda_graphs: bool | None = Field(default=None, serialization_alias="graphs")

    @property
    def chosen(self) -> dict[str, Any]:
        """Arguments of `alloy.LLM` that were set."""
        return self.model_dump(exclude_none=True, by_alias=True)


class ServerSettings(Config):
    """Limits and habits of the server."""

    # engines, each in a process of its own
    replicas: int = Field(default=1, ge=1)
    # waiting requests before 503; 0: no limit
    max_queue: int = Field(default=256, ge=0)
    # waiting prompt tokens before 503; 0: no limit
    max_queue_tokens: int = Field(default=524_288, ge=0)
    # wall clock of one request
    request_timeout_s: float = Field(default=600, gt=0)
    # an SSE comment when nothing was sent for so long
    keepalive_s: float = Field(default=15, gt=0)
    # time to finish after SIGTERM; 0: abort at once
    shutdown_s: float = Field(default=30, ge=0)
    max_body_mb: float = Field(default=16, gt=0)
    # an answer whose reader is this many tokens behind is paused, and cut off when nothing is read for so long
    slow_reader_tokens: int = Field(default=1024, ge=1)
    slow_reader_s: float = Field(default=60, gt=0)
    # requests a minute for each key; 0: no limit
    rate_limit: int = Field(default=0, ge=0)
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
    tool_format: FormatName | None = None
    # sampling values of requests that set none, over those of generation_config.json
    default: dict[Sampling, FiniteFloat] = Field(default_factory=dict[Sampling, float])
    thinking_budget: int | None = Field(default=None, ge=0)
    max_thinking_budget: int | None = Field(default=None, ge=0)
    # stored answers of the responses API
    max_responses: int = Field(default=1000, ge=1)


class Settings(Config):
    """Everything that key=value arguments can set."""

    engine: EngineSettings = Field(default_factory=EngineSettings)
    serve: ServerSettings = Field(default_factory=ServerSettings)


def read_settings(overrides: Sequence[str]) -> Settings:
    """Settings from "key=value" arguments."""
    composed = compose_overrides(overrides)
    try:
        return Settings.model_validate(composed.data)
    except ValidationError as error:
        raise RecipeError(explain(error, Settings, composed)) from error
