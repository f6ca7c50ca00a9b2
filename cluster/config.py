"""The argument of `lorafleet.cluster.app:build`: everything a service is told, checked before anything starts.

`AppConfig` is what a Serve YAML carries under `args`, `UserConfig` what it carries as the ingress's `user_config`. This
is the one module of the floor that reads the environment.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from lorafleet.adapter_store.manifest import NAME_GRAMMAR
from lorafleet.adapter_store.source_config import DirectoryConfig, HubConfig, SourceConfig
from lorafleet.cluster.errors import EmptySecret
from lorafleet.cluster.http.auth import Keys
from lorafleet.cluster.validation import with_integers
from lorafleet.workers.config import DEVICE_PATTERN, Bytes, EngineConfig, ModelConfig, PoolConfig, Settings

NAME_PATTERN = rf"^{NAME_GRAMMAR}$"
VARIABLE_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]*$"


Warm = Literal["all"] | Annotated[int, Field(ge=0), BeforeValidator(with_integers)]
"""On how many workers, beside those that must have it, an adapter is made resident."""


class DesiredAdapter(Settings):
    """An adapter that the service is to have."""

    name: str = Field(pattern=NAME_PATTERN, description="What requests call it.")
    source: str = Field(min_length=1, description="Name of a configured source.")
    key: str = Field(min_length=1, description="Where the source has it.")
    pinned: bool = Field(default=False, description="Resident on every worker and never evicted.")
    warm: Warm = Field(default=1, description="`all`, or on how many workers to make it resident at once.")


def _no_name_twice(named: tuple[Any, ...]) -> tuple[Any, ...]:
    for name, count in Counter(item.name for item in named).items():
        if count > 1:
            raise ValueError(f"the name {name!r} is given twice; names must differ")
    return named


DesiredAdapters = Annotated[tuple[DesiredAdapter, ...], AfterValidator(_no_name_twice)]


class UserConfig(Settings):
    """`user_config` of the ingress deployment: applied in the background, without a restart."""

    adapters: DesiredAdapters = Field(
        default=(),
        description="The desired adapters. Names that an earlier user_config brought and this one lacks are deleted; "
        "names loaded in another way are left alone.",
    )


class AdaptersConfig(PoolConfig):
    """Sources of adapters, and the memory that adapters may take."""

    sources: Annotated[tuple[SourceConfig, ...], AfterValidator(_no_name_twice)] = Field(
        default=(), description="Where adapters may be fetched from."
    )
    preload: DesiredAdapters = Field(default=(), description="Adapters to load before the service counts as ready.")
    host_cache_bytes: Bytes = Field(
        default=2**30, description="Host memory for the weights of adapters that workers may fetch."
    )
    state_dir: Path | None = Field(
        default=None,
        description="Where the store keeps its catalogue and its versions; default `~/.lorafleet/<model.id>`.",
    )

    @property
    def hubs(self) -> frozenset[str]:
        """Names of the sources that take revisions."""
        return frozenset(source.name for source in self.sources if isinstance(source, HubConfig))

    @property
    def pool(self) -> PoolConfig:
        return PoolConfig(**{name: getattr(self, name) for name in PoolConfig.model_fields})


class WorkerConfig(EngineConfig):
    """The workers: how many, on what, and how much each takes on."""

    device: str = Field(
        default="auto",
        pattern=DEVICE_PATTERN,
        description="`auto`: a GPU if num_gpus is set, else the CPU; or `cpu`, `cuda`, `cuda:N`.",
    )
    num_replicas: int = Field(
        default=1, ge=1, le=10_000, description="Workers, each with the base and a pool of its own."
    )
    num_gpus: float = Field(
        default=0,
        ge=0,
        allow_inf_nan=False,
        description="GPUs that Ray reserves for each worker: tensor_parallel_size, where that is more than 1.",
    )
    num_cpus: float = Field(
        default=0.25, gt=0, allow_inf_nan=False, description="CPUs that Ray reserves for each worker."
    )
    cpu_threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Threads of one worker on a CPU, which its ranks share; default its share of the machine's cores.",
    )
    max_queued_requests: int = Field(
        default=256,
        ge=0,
        description="Requests that may wait while every worker holds twice max_running; more are refused with 429. "
        "Each ingress takes an equal share of them.",
    )
    spare_processes: int = Field(
        default=1,
        ge=0,
        le=8,
        description="Processes that each node keeps in reserve beside its workers. One that takes a dead worker's "
        "place has torch and transformers imported already. Each takes 350 MB of memory or more, and none of a GPU's.",
    )
    drain_s: float = Field(
        default=600.0, gt=0, description="How long a worker that is to stop may take to end the streams it has."
    )

    @model_validator(mode="after")
    def _a_device_for_each_rank(self) -> Self:
        size = self.tensor_parallel_size
        if self.num_gpus > 1 and self.num_gpus != int(self.num_gpus):
            raise ValueError(
                f"num_gpus must be a whole number where it is over 1, as Ray wants it; got {self.num_gpus:g}"
            )
        if size > 1 and self.num_gpus not in (0, size):
            raise ValueError(
                f"num_gpus must be {size} for tensor_parallel_size={size}, a GPU for each rank of a worker, or 0 for "
                f"ranks on the CPU; got {self.num_gpus:g}"
            )
        if size > 1 and self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(
                f"device must be auto, cpu or cuda for tensor_parallel_size={size}, since each rank takes a GPU of its "
                f"own; got {self.device!r}"
            )
        return self

    @property
    def resolved_device(self) -> str:
        """The device without `auto`, so that the store, which has no GPU, knows the dtype that workers serve."""
        if self.device != "auto":
            return self.device
        return "cuda" if self.num_gpus else "cpu"

    @property
    def engine(self) -> EngineConfig:
        values = {name: getattr(self, name) for name in EngineConfig.model_fields}
        return EngineConfig(**values | {"device": self.resolved_device})

    @property
    def max_load(self) -> int:
        """Requests that one worker takes, running and waiting: enough for the scheduler to look past one that waits."""
        return 2 * self.max_running


class IngressConfig(Settings):
    """The ways in."""

    num_replicas: int = Field(
        default=1,
        ge=1,
        le=10_000,
        description="Ingresses, any of which takes every call. One for each one or two workers keeps up with GPUs.",
    )


class AuthConfig(Settings):
    """Names of the environment variables that hold the secrets. The secrets themselves are never configuration."""

    api_keys_env: str = Field(
        default="LORAFLEET_API_KEYS",
        pattern=VARIABLE_PATTERN,
        description="Keys of the data plane, separated by commas; unset: open to all. Set without a key in it, the "
        "service does not start.",
    )
    admin_token_env: str = Field(
        default="LORAFLEET_ADMIN_TOKEN",
        pattern=VARIABLE_PATTERN,
        description="Token of the admin plane; may be unset only while HTTP is bound to loopback.",
    )

    @model_validator(mode="after")
    def _two_variables(self) -> Self:
        if self.api_keys_env == self.admin_token_env:
            raise ValueError("api_keys_env and admin_token_env must differ, or clients' keys open the admin plane")
        return self

    def read_keys(self) -> Keys:
        """The secrets, from the environment of this process. Raises EmptySecret for a variable that is set to none."""
        api_keys = tuple(key.strip() for key in os.environ.get(self.api_keys_env, "").split(",") if key.strip())
        admin_token = os.environ.get(self.admin_token_env, "").strip()
        for name, value in ((self.api_keys_env, api_keys), (self.admin_token_env, admin_token)):
            if name in os.environ and not value:
                raise EmptySecret(f"{name} is set and holds no secret: give it one, or unset it")
        return Keys(api_keys=api_keys, admin_token=admin_token or None, admin_token_env=self.admin_token_env)


class HttpConfig(Settings):
    """Origins that may call over HTTP."""

    cors_origins: tuple[Annotated[str, Field(pattern=r"^(\*|[A-Za-z][A-Za-z0-9+.-]*://[^/\s]+)$")], ...] = Field(
        default=(),
        description="Origins, as `https://app.example.org`, whose pages browsers let call the service; `*`: all. "
        "Without any a browser calls it from no other origin.",
    )


class TracingConfig(Settings):
    """Traces of requests, for OpenTelemetry's collectors."""

    endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://\S+$",
        description="Where spans go as OTLP over HTTP, as `http://collector:4318/v1/traces`; without it nothing is "
        "traced. It needs the extra `lorafleet[tracing]`.",
    )
    sample_ratio: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Share of the requests to trace, of those whose `traceparent` does not say.",
    )


class AppConfig(Settings):
    """Everything that `build` takes.

    Values may come flat from a command line: `model.id=demo worker.num_replicas=4 'adapters.preload=[{name: ...}]'`, on
    top of a Serve YAML if `config=deploy/serve/local.yaml` names one.
    """

    model: ModelConfig
    adapters: AdaptersConfig = AdaptersConfig()
    worker: WorkerConfig = WorkerConfig()
    ingress: IngressConfig = IngressConfig()
    auth: AuthConfig = AuthConfig()
    http: HttpConfig = HttpConfig()
    tracing: TracingConfig = TracingConfig()

    @model_validator(mode="before")
    @classmethod
    def _unfold(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        values = dict(values)
        nested: dict[str, Any] = {}
        config = values.pop("config", None)
        if config is not None:
            nested = read_serve_args(Path(str(config)))
        for key, value in values.items():
            if not isinstance(key, str):
                raise ValueError(f"{key!r} is not the name of a setting")
            path = key.split(".")
            for part in reversed(path):
                value = {part: _parsed(value)}
            nested = _merged(nested, value)
        return nested

    @model_validator(mode="after")
    def _preload_can_be_loaded(self) -> Self:
        known = [source.name for source in self.adapters.sources]
        for adapter in self.adapters.preload:
            if adapter.name == self.model.id:
                raise ValueError(
                    f"adapters.preload: {adapter.name!r} is the base's name, its model.id: choose another one"
                )
            if adapter.source not in known:
                raise ValueError(
                    f"adapters.preload: {adapter.name!r} comes from source {adapter.source!r}, "
                    f"but the sources are {', '.join(known) or 'none'}"
                )
        return self

    @property
    def model_created_s(self) -> int:
        """Unix time at which the base was written, the same at every ingress; 0 for one that lies at a hub."""
        config = Path(self.model.source) / "config.json"
        return int(config.stat().st_mtime) if config.is_file() else 0

    @property
    def state_dir(self) -> Path:
        return self.adapters.state_dir or Path.home() / ".lorafleet" / self.model.id.replace("/", "--")

    def resolved(self, base: Path) -> AppConfig:
        """The same with local paths made absolute, so that processes in other working directories find them."""
        checkpoint = base / _expanded(Path(self.model.source))
        model = self.model.model_copy(update={"source": str(checkpoint)}) if checkpoint.is_dir() else self.model
        sources = tuple(
            source.model_copy(update={"root": base / _expanded(source.root)})
            if isinstance(source, DirectoryConfig)
            else source
            for source in self.adapters.sources
        )
        state_dir = base / _expanded(self.state_dir)
        adapters = self.adapters.model_copy(update={"sources": sources, "state_dir": state_dir})
        return self.model_copy(update={"model": model, "adapters": adapters})


def _expanded(path: Path) -> Path:
    """The path with `~` or `~user` at its beginning replaced. Raises ValueError for a user who is not there."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path} begins with a home that is not known: write the whole path") from error


def read_serve_args(path: Path) -> dict[str, Any]:
    """The `args` of the application in a Serve YAML. Raises ValueError when there is not exactly one application."""
    try:
        document = _read_yaml(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config={path} cannot be read: {error}") from error
    applications = document.get("applications") if isinstance(document, dict) else None
    if not isinstance(applications, list) or len(applications) != 1 or not isinstance(applications[0], dict):
        raise ValueError(f"{path} must be a Serve config with exactly one entry in `applications`")
    args = applications[0].get("args", {})
    if not isinstance(args, dict):
        raise ValueError(f"{path}: the application's args must be an object")
    return dict(args)


def _parsed(value: Any) -> Any:
    """A value from a command line: YAML where it opens a list or a mapping, else as it is, for pydantic to convert."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        return _read_yaml(value)
    return value


def _read_yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"this is not YAML: {error}") from error


def _merged(base: Any, override: Any) -> Any:
    if isinstance(base, dict) and isinstance(override, dict):
        return base | {key: _merged(base.get(key), value) for key, value in override.items()}
    return override
