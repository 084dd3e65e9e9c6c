"""The one policy file as one frozen tree; the only place where configuration is defined.

Everything here is cheap to import: no torch, no ray, no transformers. Units are in the names: ``_s`` seconds,
``_bytes`` bytes, ``_tokens`` tokens. ``daemon/config_loader.py`` reads the YAML and reports every problem at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticKnownError

from specblock.bandit.config import PolicyConfig, ServiceConfig, StreamConfig
from specblock.bandit.config_arms import COUNTED_PAIRS
from specblock.daemon.config_adaptation import AdaptationConfig
from specblock.daemon.config_types import ByteSize, ConfigPath, Count, Fraction, Port, Seconds, Section, redact_url

Device = Annotated[str, Field(pattern=r"^(cpu|cuda(:[0-9]+)?)$")]
MIB = 2**20
NOTHING_TO_ADAPT = "the drafter has no weights; nothing to adapt"
"""Why adaptation is off with a drafter that is not a network; log, status and explain say it in these words."""


class TargetConfig(Section):
    """The language model that is served."""

    model: str = Field(min_length=1)
    """Directory in Hugging Face format, or a hub id."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); null takes the default branch. Ignored for a directory."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Number format of weights and caches; auto is bfloat16 where that is fast, else float32."""
    device: Device = "cpu"
    """cpu, cuda or cuda:N."""
    max_context_tokens: int = Field(default=1024, ge=16)
    """Prompt and output together, in tokens; sizes the KV storage of every slot."""

    @property
    def directory(self) -> Path | None:
        """Where the model lies if ``model`` is a path; None for a hub id (``name`` or ``organisation/name``)."""
        path = Path(self.model).expanduser()
        # No organisation on the hub can be called "models", which is where the shipped configurations point to.
        is_path = self.model.startswith((".", "/", "~", "models/")) or self.model.count("/") > 1
        return path if is_path or path.is_dir() else None

    @property
    def source(self) -> str:
        """What loaders take: the directory, or the hub id."""
        return str(self.directory or self.model)


class DrafterConfig(Section):
    """The drafter and the shape of its draft tree."""

    kind: Literal["specblock", "eagle3", "parallel", "prompt_lookup"] = "specblock"
    """Drafter family; must be what the directory holds. prompt_lookup has no weights and takes no directory."""
    path: ConfigPath | None = Field(default=None, validate_default=True)
    """Directory of the base drafter; imported into the registry as version 0 on first start."""
    tree: Literal["cost_chosen", "fixed"] = "cost_chosen"
    """cost_chosen: sizes per cycle from measured cost, up to those below, or none at all; fixed: always those below."""
    compat: Literal["corrected", "published"] = "corrected"
    """published: refresh and use the rank head as the published code does, for checkpoints tuned with it."""
    blocks: int = Field(default=2, ge=1, le=8)
    """Drafter forwards per cycle; each proposes one block of tokens."""
    leaf_cap: int = Field(default=8, ge=1, le=64)
    """Most leaves that one block hands to the next."""
    node_budget: int = Field(default=31, ge=1, le=255)
    """Most draft nodes the target verifies in one cycle, root not counted."""
    beam: int = Field(default=10, ge=6, le=64)
    """Alternatives at a slot at most; with the rank head at the first slot, and by rank class up to 6 at others."""
    rank_head: bool = False
    """Let specblock's rank head say how many alternatives a slot gets; off: beam everywhere, and scores decide."""
    shared_noise: bool = True
    """At temperature > 0, rank proposals with the noise the target will choose by. Lossless either way."""
    noise_scale: float = Field(default=1.0, gt=0, le=4)
    """Spread of the target's choice around the perturbed draft score, in nats; smaller trusts the drafter more."""
    pair_weight: float = Field(default=0.5, ge=0, le=1)
    """How much it counts which token follows which within a block of specblock; 0: not at all. Lossless either way."""

    @field_validator("path")
    @classmethod
    def _where_there_are_weights(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        kind = info.data.get("kind")  # absent if it is wrong itself, which is reported
        if kind == "prompt_lookup" and path is not None:
            raise ValueError("prompt_lookup has no weights to load; remove this key")
        if kind not in (None, "prompt_lookup") and path is None:
            raise PydanticKnownError("missing")
        return path

    @property
    def has_weights(self) -> bool:
        """Whether there is anything to load, to keep versions of, or to train."""
        return self.path is not None


_MOST_THREADS = 512


class EngineConfig(Section):
    """The decode loop."""

    slots: int = Field(default=8, ge=1, le=1024)
    """Requests decoded at the same time."""
    prefill_chunk_tokens: int = Field(default=256, ge=1)
    """Prompt tokens processed between two decode cycles."""
    max_waiting: int = Field(default=64, ge=0)
    """Requests that may wait for a slot; beyond it the gateway answers 429."""
    max_output_tokens: int = Field(default=1024, ge=1)
    """Largest max_tokens a request may ask for."""
    threads: int | Literal["auto"] = "auto"
    """CPU threads of the engine process; auto tries how many make decoding faster, of the cores that a trainer on the
    CPU leaves."""
    cuda_graphs: bool = True
    """Decode cycles run as recorded CUDA graphs; ignored on a CPU. Recording takes memory and some seconds at start."""
    speculation: bool = True
    """false: plain decoding only, nothing is drafted."""
    stream_interval_s: float = Field(default=0.02, ge=0, le=1)
    """Tokens of one request are collected for at most this many seconds before they leave the engine."""
    segment_cycles: int = Field(default=32, ge=1, le=4096)
    """Decode cycles of one request that make one acceptance event; its end makes one as well."""

    @field_validator("threads", mode="before")
    @classmethod
    def _number_or_auto(cls, threads: Any) -> Any:
        number = isinstance(threads, int) and not isinstance(threads, bool) and 1 <= threads <= _MOST_THREADS
        if threads != "auto" and not number:
            raise ValueError(f"must be auto or a whole number from 1 to {_MOST_THREADS}")
        return threads


class WindowsConfig(Section):
    """Training windows the engine keeps in memory."""

    budget_bytes: ByteSize = Field(default=256 * MIB, ge=MIB)
    """One byte budget for all windows, in bytes or with a unit ("256MiB")."""
    max_window_tokens: int = Field(default=512, ge=8)
    """Longer conversations are cut to this many tokens; the cut is recorded."""
    per_domain_quota: Fraction = 0.5
    """Largest share of the budget that one domain may hold."""
    heldout_fraction: float = Field(default=0.25, gt=0, lt=1)
    """Share of conversations kept out of training, to judge updates on."""
    top_k: int = Field(default=32, ge=1, le=1024)
    """Target log-probabilities kept per position."""
    ttl_s: Seconds = 3600.0
    """Windows older than this many seconds are dropped: traffic from before a shift teaches the wrong thing."""


class TrainerConfig(Section):
    """The process that trains drafter updates."""

    threads: int = Field(default=1, ge=1, le=512)
    """CPU threads of the trainer process."""
    device: Device = "cpu"
    """cpu, cuda or cuda:N."""
    batch_windows: Count = 8
    """Windows per training step."""
    max_positions: Count = 20_000
    """Most training positions pulled for one update; bounds the trainer's memory and the transfer."""
    keep_versions: int = Field(default=8, ge=2)
    """Newest drafter versions kept on disk, to be restored when their text comes back; the base stays besides."""


class RedisConfig(Section):
    """The stream that carries acceptance events; scalars only, never text or tokens."""

    url: str | None = None
    """redis://, rediss:// or unix:// URL of your own server; null starts a private redis-server child."""
    maxmemory_bytes: ByteSize = Field(default=64 * MIB, ge=MIB)
    """Memory limit of the child, in bytes or with a unit."""
    stream_max_entries: int = Field(default=100_000, ge=100)
    """The stream is trimmed to about this many entries."""
    block_s: float = Field(default=1.0, gt=0, le=2)
    """How long one read waits for new events, in seconds."""
    socket_timeout_s: Seconds = 5.0
    """Silence after which a connection counts as lost, in seconds; must exceed block_s by more than 2 s."""

    @field_validator("url")
    @classmethod
    def _scheme(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("must start with redis://, rediss:// or unix://")
        return url

    @field_validator("socket_timeout_s")
    @classmethod
    def _outlives_block(cls, timeout_s: float, info: ValidationInfo) -> float:
        block_s = info.data.get("block_s")
        if block_s is not None and timeout_s <= block_s + 2:
            raise ValueError(
                f"must be more than block_s + 2 = {block_s + 2:g} seconds, or every idle read looks like a lost server"
            )
        return timeout_s


class RayConfig(Section):
    """The Ray cluster the actors run in."""

    address: str = "local"
    """local starts a private cluster; auto or host:port joins an existing one."""
    dashboard: bool = True
    """Start the Ray dashboard with a private cluster."""
    dashboard_host: str = "127.0.0.1"
    """Interface of the dashboard; anyone who reaches it (with the token) can run code."""
    dashboard_port: Port = 8265
    """TCP port of the dashboard."""
    object_store_memory_bytes: ByteSize = Field(default=256 * MIB, ge=80 * MIB)
    """Shared memory for window transfers, in bytes or with a unit; Ray needs at least 80 MiB."""
    engine_gpus: float = Field(default=0, ge=0)
    """GPUs reserved for the engine; a fraction shares one."""
    trainer_gpus: float = Field(default=0, ge=0)
    """GPUs reserved for the trainer; a fraction shares one."""

    @field_validator("address")
    @classmethod
    def _address(cls, address: str) -> str:
        host, colon, port = address.rpartition(":")
        if address not in ("local", "auto") and not (host and colon and port.isdigit()):
            raise ValueError('must be "local", "auto" or host:port')
        return address


class HttpConfig(Section):
    """The OpenAI-compatible endpoint."""

    host: str = "127.0.0.1"
    """Interface to listen on; 0.0.0.0 opens it to the network: set api_key then."""
    port: Port = 8000
    """TCP port."""
    api_key: Annotated[str, Field(min_length=8)] | None = None
    """Bearer token asked for on everything but /health*; null asks for none."""
    drain_deadline_s: float = Field(default=30.0, ge=0, le=3600)
    """Seconds that running requests get to finish after SIGTERM."""


class LoggingConfig(Section):
    """Logs go to standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe level that is written."""
    json_lines: bool = Field(default=False, alias="json")
    """One JSON object per line instead of text."""


class MetricsConfig(Section):
    """The /metrics endpoint."""

    vllm_compat: bool = True
    """Publish vLLM's metric names beside our own, for dashboards and benchmarks that read those."""
    max_domain_labels: int = Field(default=16, ge=0, le=256)
    """Distinct domain names used as label values; later ones are counted as "other"."""


def _empty_section(value: object) -> object:
    """``http:`` with every key commented out is null in YAML and means the defaults."""
    return {} if value is None else value


_EMPTY = BeforeValidator(_empty_section)


class DaemonConfig(Section):
    """The whole policy of one daemon."""

    state_dir: ConfigPath = Field(default="~/.local/state/specblockd", validate_default=True)  # type: ignore[assignment]
    """Directory for drafter versions, ledger, snapshots and logs; created on first start."""
    target: TargetConfig
    drafter: DrafterConfig
    engine: Annotated[EngineConfig, _EMPTY] = EngineConfig()
    windows: Annotated[WindowsConfig, _EMPTY] = WindowsConfig()
    adaptation: Annotated[AdaptationConfig, _EMPTY] = Field(default=AdaptationConfig(), validate_default=True)
    trainer: Annotated[TrainerConfig, _EMPTY] = TrainerConfig()
    redis: Annotated[RedisConfig, _EMPTY] = RedisConfig()
    ray: Annotated[RayConfig, _EMPTY] = RayConfig()
    http: Annotated[HttpConfig, _EMPTY] = HttpConfig()
    logging: Annotated[LoggingConfig, _EMPTY] = LoggingConfig()
    metrics: Annotated[MetricsConfig, _EMPTY] = MetricsConfig()

    @field_validator("adaptation")
    @classmethod
    def _nothing_without_weights(cls, adaptation: AdaptationConfig, info: ValidationInfo) -> AdaptationConfig:
        """Off with a drafter that cannot be trained.

        Who asks for adaptation in so many words hears that it cannot be, like every other contradiction; who only left
        the default in place gets what is possible. It is written into the policy, so that every reader sees it off.
        """
        drafter = info.data.get("drafter")
        if drafter is None or drafter.has_weights or not adaptation.enabled:
            return adaptation
        if "enabled" in adaptation.model_fields_set:
            raise ValueError(f"adaptation.enabled: must be false with drafter.kind {drafter.kind}: {NOTHING_TO_ADAPT}")
        return adaptation.model_copy(update={"enabled": False})

    @field_validator("adaptation")
    @classmethod
    def _pairs_where_slots_follow_each_other(
        cls, adaptation: AdaptationConfig, info: ValidationInfo
    ) -> AdaptationConfig:
        drafter = info.data.get("drafter")
        alone = [arm.name for arm in adaptation.arms if arm.patterns == COUNTED_PAIRS]
        if drafter is not None and drafter.kind != "specblock" and alone:
            raise ValueError(
                f"adaptation.arms: {alone[0]} counts token pairs, which drafter.kind {drafter.kind} has no use for"
            )
        return adaptation

    @property
    def adaptation_off(self) -> str:
        """Why nothing is adapted, in words; empty while adaptation is on."""
        if not self.drafter.has_weights:
            return NOTHING_TO_ADAPT
        return "" if self.adaptation.enabled else "adaptation.enabled is false"

    @model_validator(mode="after")
    def _fits_together(self) -> DaemonConfig:
        problems = [message for holds, message in self._rules() if not holds]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _rules(self) -> list[tuple[bool, str]]:
        """Rules across sections; each message starts with the dotted path it is reported at."""
        context = self.target.max_context_tokens
        exposed = self.http.host not in ("127.0.0.1", "localhost", "::1")
        return [
            (
                self.engine.max_output_tokens <= context,
                f"engine.max_output_tokens: must not exceed target.max_context_tokens = {context}",
            ),
            (
                self.windows.max_window_tokens <= context,
                f"windows.max_window_tokens: must not exceed target.max_context_tokens = {context}",
            ),
            (
                not exposed or self.http.api_key is not None,
                f"http.host: {self.http.host} is reachable from the network; set http.api_key as well",
            ),
            (
                self.http.port != self.ray.dashboard_port or not self.ray.dashboard,
                f"http.port: {self.http.port} is also ray.dashboard_port",
            ),
            (
                self.ray.engine_gpus == 0 or self.target.device.startswith("cuda"),
                "ray.engine_gpus: GPUs are reserved but target.device is cpu",
            ),
            (
                self.ray.trainer_gpus == 0 or self.trainer.device.startswith("cuda"),
                "ray.trainer_gpus: GPUs are reserved but trainer.device is cpu",
            ),
            (
                not self.target.device.startswith("cuda") or self.ray.engine_gpus > 0,
                "ray.engine_gpus: must be above 0 when target.device is cuda, or Ray hides the GPU from the engine",
            ),
            (
                not self.trainer.device.startswith("cuda") or self.ray.trainer_gpus > 0,
                "ray.trainer_gpus: must be above 0 when trainer.device is cuda, or Ray hides the GPU from the trainer",
            ),
        ]

    def with_dtype(self, dtype: str) -> DaemonConfig:
        """The same policy with ``target.dtype`` settled, see ``models.settle_dtype``."""
        return self.model_copy(update={"target": self.target.model_copy(update={"dtype": dtype})})

    def policy_config(self) -> PolicyConfig:
        """The decision rule's configuration."""
        positions_per_step = self.trainer.batch_windows * self.windows.max_window_tokens
        return self.adaptation.policy_config(min(positions_per_step, self.trainer.max_positions))

    def stream_config(self, url: str) -> StreamConfig:
        """The event stream's configuration; ``url`` is that of the server in use (see ``RedisServer.start``)."""
        return StreamConfig(
            url=url,
            max_entries=self.redis.stream_max_entries,
            socket_timeout_s=self.redis.socket_timeout_s,
            block_max_s=self.redis.block_s,
        )

    def service_config(self) -> ServiceConfig:
        """The bandit service's configuration; its files live in ``state_dir/bandit``."""
        return ServiceConfig(
            directory=str(self.state_dir / "bandit"),
            decide_every_s=self.adaptation.decide_every_s,
            decide_every_events=self.adaptation.decide_every_events,
            block_s=self.redis.block_s,
        )

    def resolved(self) -> dict[str, Any]:
        """The complete configuration as plain JSON data for the log, with secrets replaced by ``***``."""
        dump = self.model_dump(mode="json", by_alias=True)
        if dump["http"]["api_key"] is not None:
            dump["http"]["api_key"] = "***"
        if dump["redis"]["url"] is not None:
            dump["redis"]["url"] = redact_url(dump["redis"]["url"])
        return dump
