"""Configuration: the base of everything a user can write in a file."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Base of recipe tables and model configs: frozen, typed, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
