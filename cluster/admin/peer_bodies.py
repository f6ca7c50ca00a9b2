"""Bodies of vLLM's and SGLang's load and unload routes."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from lorafleet.workers.config import Settings

_Required = Annotated[str, WithJsonSchema({"type": "string", "minLength": 1})]
"""What is missing is refused in each server's own words."""


_Lax = Annotated[bool, BeforeValidator(lambda value: False if value is None else value)]
"""As those servers take it: `"true"`, `1` and their like, and null for the default."""


class LoadAdapter(BaseModel):
    """Body of a load request, as vLLM and SGLang take it. Their fields without an effect here are ignored."""

    model_config = ConfigDict(use_attribute_docstrings=True, json_schema_extra={"required": ["lora_name", "lora_path"]})

    lora_name: _Required = ""
    lora_path: _Required = ""
    """The folder's path, which lies in a configured source, or a key of one."""
    load_inplace: _Lax = False
    """vLLM: replace an adapter that has this name."""
    pinned: _Lax = False
    """SGLang: never evict it."""


class UnloadAdapter(BaseModel):
    """Body of an unload request, as vLLM and SGLang take it."""

    model_config = ConfigDict(strict=True, json_schema_extra={"required": ["lora_name"]})

    lora_name: _Required = ""


class SglangReply(Settings):
    """SGLang's."""

    success: bool
    error_message: str | None
    loaded_adapters: dict[str, str] = Field(description="Source and key of each adapter that is loaded then.")


class VllmErrorDetail(Settings):
    """vLLM's."""

    message: str
    type: str
    param: str | None
    code: int = Field(description="The status.")


class VllmErrorBody(Settings):
    """vLLM's."""

    error: VllmErrorDetail
