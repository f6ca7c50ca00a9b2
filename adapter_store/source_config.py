"""Settings of sources of adapters. Apart from the sources, so that who only reads settings imports none of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Source(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$", description="What callers and configs call it.")
    resolve: bool = Field(
        default=False, description="Requests may name adapters that were never loaded: the name is asked for as a key."
    )
    strict: bool = Field(
        default=False,
        description="Refuse a config that has fields or names which PEFT ignores; else they are warnings.",
    )
    timeout_s: float = Field(default=300.0, gt=0, description="Longest time that one adapter may take to arrive.")


class DirectoryConfig(_Source):
    """A folder of adapter folders. Symbolic links are followed as long as they stay in it."""

    kind: Literal["directory"] = "directory"
    root: Path = Field(description="The folder; keys are paths below it.")


class HubConfig(_Source):
    """The Hugging Face hub or its local cache. Honours HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN."""

    kind: Literal["hub"] = "hub"
    namespace: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="User or organisation: keys are then its repositories. Without it a key is `owner/repository`, and "
        "with `resolve` a request may name any repository of the hub. A key may end in `@revision`.",
    )
    revision: str | None = Field(
        default=None, min_length=1, description="Branch, tag or commit of keys that name none."
    )
    cache_dir: Path | None = Field(default=None, description="Default the hub client's own.")


class ObjectStoreConfig(_Source):
    """Anything that fsspec opens: `s3://bucket/adapters`, `gs://...`, `memory://...`."""

    kind: Literal["object_store"] = "object_store"
    url: str = Field(min_length=1, description="fsspec URL; keys are paths below it.")
    storage_options: Mapping[str, Any] = Field(default={}, description="Given to fsspec as they are.")


SourceConfig = Annotated[DirectoryConfig | HubConfig | ObjectStoreConfig, Field(discriminator="kind")]
"""One of the three, told apart by `kind`."""
