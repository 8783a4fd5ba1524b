"""The sections of a configuration: every field with its type, default, bounds and meaning."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from trainer.config.section import Section
from trainer.units import SecondsField, SizeField, Span, SpanField


class MixtureEntry(Section):
    """One dataset of a mixture."""

    path: str
    """Like data.path."""
    weight: float = Field(gt=0)
    """Its share of the images is weight / (sum of weights), rounded to thousandths."""


class DataConfig(Section):
    """What is trained on: `path`, or several as `[[data.mixture]]`."""

    path: str | None = None
    """Folder that data_prep wrote, folder of webdataset tars, or tars as a pattern ("/data/{000..099}.tar"); a path, or
    a URL of http, https, s3, gs or hf."""
    mixture: list[MixtureEntry] = Field(default=[])
    """Datasets that are mixed, each with its own epochs."""
    flip: bool = False
    """Mirror each image left to right with probability 1/2, its second images with it (but no array)."""
    order: Literal["global", "windowed", "lanes"] = "global"
    """"global" shuffles all samples; "windowed" shuffles shards, then the samples of `window` shards at a time; "lanes"
    does so in each of `lanes` parts of the dataset, so that a node reads only its parts (docs/stream.md)."""
    window: int = Field(default=16, gt=0, le=1_000_000)
    """Shards whose samples are shuffled together in the orders "windowed" and "lanes"."""
    lanes: int = Field(default=8, gt=0, le=1_000_000)
    """Parts of the dataset in the order "lanes"; must divide train.global_batch, and should be a multiple of the number
    of nodes."""
    holdout: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the images that is never trained on."""
    cond: list[Literal["label", "caption", "low_res", "source", "array"]] = Field(default=[])
    """What is read besides the image, and given to a network that takes it: the class ("label"), a caption, a second
    image ("low_res", "source") or an array of each sample. A sample without it counts as damaged."""
    on_bad_sample: Literal["raise", "skip"] = "raise"
    """What a damaged image does: "raise" ends the run, "skip" trains on the next whole one instead."""
    max_bad_samples: int = Field(default=100, ge=0, le=10**12)
    """Damaged images that a process may meet under "skip"; one more ends the run."""
    cache_dir: str | None = None
    """Folder on a disk of each node, where shards are copied to before they are read; needed for URLs."""
    cache_size: SizeField = 200 * 10**9
    """Most that the copies in cache_dir may take: "200 GB"."""
    workers: int | None = Field(default=None, ge=0, le=1024)
    """Loader processes for each rank; 0 reads and decodes in the training process. Left out: 4, or as many as the rank
    has cores, if they are fewer."""
    start_method: Literal["fork", "spawn"] = "fork"
    """How loader processes start: "spawn" takes seconds longer and shares nothing with the training process."""
    prefetch: int = Field(default=4, ge=1, le=10_000)
    """Micro-batches that each loader process keeps ready."""

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if (self.path is None) == (not self.mixture):
            raise ValueError("should have either path or [[data.mixture]]")
        if self.mixture and self.order == "lanes":
            raise ValueError('order = "lanes" is for one dataset; a mixture may have "global" or "windowed"')
        if len(set(self.cond)) < len(self.cond):
            raise ValueError(f"cond should name each once, not {', '.join(self.cond)}")
        return self

    @property
    def where(self) -> str:
        """The dataset or datasets, for messages."""
        return self.path or " + ".join(entry.path for entry in self.mixture)


class AdamConfig(Section):
    """Adam for one network; what is left out is as in [optimizer]."""

    learning_rate: float = Field(default=1e-4, gt=0)
    """Learning rate after the warm-up."""
    warmup: SpanField = Span(1000, "steps")
    """Linear warm-up from 0; "0 steps" for none."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes on after the warm-up: "linear" falls to 0 over the whole train.duration, "cosine" as
    half a period of a cosine does."""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    """Decay rates of Adam's two moments."""
    eps: float = Field(default=1e-8, gt=0)
    """Adam's epsilon."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decay of all weights in each step, times the learning rate (AdamW, Loshchilov and Hutter 2019); 0 is Adam."""
    clip_norm: float = Field(default=1.0, gt=0, allow_inf_nan=True)
    """The gradient's global norm is clipped to this; inf never clips."""


class OptimizerConfig(AdamConfig):
    """Adam, as in appendix B, or AdamW, for every network."""

    networks: dict[str, AdamConfig] = Field(default={})
    """By name of a network, what differs for it."""

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or not isinstance(raw.get("networks"), dict):
            return raw
        shared = {name: value for name, value in raw.items() if name in AdamConfig.model_fields}
        own = {name: {**shared, **some} if isinstance(some, dict) else some for name, some in raw["networks"].items()}
        return {**raw, "networks": own}

    def of(self, network: str) -> AdamConfig:
        """The settings for a network."""
        return self.networks.get(network, self)


class TrainConfig(Section):
    """How long and how."""

    duration: SpanField = Span(500_000, "steps")
    """Length of the whole run, restarts included."""
    global_batch: int = Field(default=64, gt=0, le=2**22)
    """Images in one optimizer step, over all ranks and accumulated micro-batches."""
    micro_batch: int | None = Field(default=None, gt=0, le=2**22)
    """Most images that a device holds at once; the rest of its share is accumulated. Left out: its whole share."""
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    """Decay of the exponential moving average of the weights, applied every step."""
    ema_warmup: bool = False
    """Let the decay grow as 1 - (1 + n)^(-2/3) with the n-th update until it is ema_decay: short runs forget sooner."""
    ema_sigma_rel: list[Annotated[float, Field(gt=0, lt=0.28)]] = Field(default=[], max_length=64)
    """Widths, relative to the run's length, of further averages with a power-function profile (Karras et al. 2024)."""
    ema_snapshots: SpanField = Span(0, "steps")
    """Between two snapshots of the averages of ema_sigma_rel, from which one of any width can be made afterwards;
    "0 steps" for none."""
    freeze: list[str] = Field(default=[])
    """Networks, or parameters as patterns, that are not trained: "down.*" of the network "model", "critic" and
    "critic.conv.*" of another (docs/strategies.md). It stays the same for the whole run."""
    init_from: dict[str, str] = Field(default={})
    """By name of a network (the plain one is "model") the run or checkpoint whose weights it starts from in step 0:
    "PATH" takes the raw ones, "PATH:ema" the average. It stays the same for the whole run, which reads it once."""
    strategy: Literal["ddp", "zero1", "zero2", "zero3", "fsdp2", "hsdp"] = "ddp"
    """What ranks share: "ddp" nothing; DeepSpeed's "zero1" moments, "zero2" gradients too, "zero3" weights too; "fsdp2"
    all by PyTorch; "hsdp" all, within groups of ranks. A checkpoint fits all of them (docs/strategies.md). "auto", or
    left out: what `accelerate launch` was told, else what the run has had so far, else "ddp" (docs/accelerate.md)."""
    hsdp_shard_size: int | None = Field(default=None, gt=0, le=1_000_000)
    """With "hsdp": ranks in a group; left out: those of a node."""
    bucket_size: SizeField = 25 * 2**20
    """With "ddp": bytes of gradients that ranks sum in one exchange, while others are still computed."""
    offload_optimizer: bool = False
    """With "zero1" to "zero3": moments and master weights stay in the host's memory, and Adam runs there."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the network; weights, loss, optimizer and schedule stay in float32. "tf32" is float32 that GPUs
    round to 10 bits before they multiply. "auto", or left out: as for strategy, else "fp32"."""
    activation_checkpointing: Literal["none", "selective", "full", "budget"] = "none"
    """What the backward pass recomputes: "selective" all but convolutions and attention, for little time (not with
    "zero3"); "full" whatever lies within a residual block, for least memory and about a third more time; "budget"
    either of as few blocks as memory_budget asks for."""
    memory_budget: SizeField | None = None
    """With activation_checkpointing = "budget": "40 GB" for weights, gradients and activations of a micro-batch, as
    --dry-run estimates them; moments and averages come on top."""
    compile: Literal["none", "regional"] = "none"
    """"regional" has torch.compile fuse each residual block with its attention: less memory traffic on GPUs, for
    seconds a shape when a run first starts. Needs a C++ compiler on CPUs (docs/gpu.md)."""
    compile_cache: str | None = None
    """Folder for compiled code, kept for the next start; left out: TORCHINDUCTOR_CACHE_DIR, or one in ~/.cache."""
    cuda_graphs: bool = False
    """With compile = "regional" and strategy = "ddp": GPUs replay a compiled block as one graph, which helps small
    micro-batches, for which the host cannot queue kernels as fast as they run."""
    max_nonfinite_steps: int = Field(default=10, ge=0, le=10**12)
    """Steps of a run that may be skipped and dumped for a NaN or infinity in loss or gradient; one more ends it."""
    timeout: Annotated[SecondsField, Field(gt=0)] = 600.0
    """How long a rank waits for the others, to start and in every exchange, before it gives them up: "10 minutes"."""
    hang_timeout: SecondsField = 300.0
    """A rank that does nothing new for so long has hung: all ranks write their stacks to stderr and RUN/hangs/ and end.
    The first step and saves in the background have four times as long. Before the first step it is the longer one of
    this and timeout, without reading, writing or computing. Less than timeout; "0 seconds" for never."""

    @model_validator(mode="before")
    @classmethod
    def _leave_open(cls, raw: Any) -> Any:
        """Drop "auto", which means the default: what a launcher sets has been applied before."""
        if not isinstance(raw, dict):
            return raw
        return {n: value for n, value in raw.items() if value != "auto" or n not in ("strategy", "precision")}

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.hsdp_shard_size is not None and self.strategy != "hsdp":
            raise ValueError(f'hsdp_shard_size is for strategy = "hsdp", not "{self.strategy}"')
        if self.offload_optimizer and not self.strategy.startswith("zero"):
            raise ValueError(f'offload_optimizer is for strategy = "zero1", "zero2" or "zero3", not "{self.strategy}"')
        if self.precision == "fp16" and self.strategy != "ddp":
            raise ValueError(f'precision = "fp16" is for strategy = "ddp"; with "{self.strategy}" take "bf16"')
        if self.activation_checkpointing in ("selective", "budget") and self.strategy == "zero3":
            raise ValueError(
                f'activation_checkpointing = "{self.activation_checkpointing}" would keep weights that "zero3" '
                'gathers; take "full"'
            )
        if (self.activation_checkpointing == "budget") != (self.memory_budget is not None):
            raise ValueError('activation_checkpointing = "budget" and memory_budget go together')
        if self.compile_cache is not None and self.compile == "none":
            raise ValueError('compile_cache is for compile = "regional"')
        if self.cuda_graphs and (self.compile, self.strategy) != ("regional", "ddp"):
            raise ValueError('cuda_graphs is for compile = "regional" with strategy = "ddp"')
        if self.ema_snapshots.count and not self.ema_sigma_rel:
            raise ValueError("ema_snapshots keeps the averages of ema_sigma_rel, which is empty")
        return self


class CheckpointConfig(Section):
    """When the state is saved and what is kept."""

    every: SpanField = Span(5000, "steps")
    """Between two checkpoints; "0 steps" saves only at the end or when stopped."""
    background: bool = True
    """Write while training goes on; only copying the state holds it up."""
    on_failure: Literal["stop", "continue"] = "stop"
    """What a checkpoint that cannot be written (no space, say) does: "stop" ends the run, "continue" tries again when
    the next one is due. Older checkpoints stay in either case."""
    keep: int = Field(default=3, gt=0, le=10**9)
    """Newest checkpoints that are kept."""
    keep_every: SpanField = Span(0, "steps")
    """Besides the newest, one for every such span is kept for ever; "0 steps" for none."""
    keep_best: int = Field(default=0, ge=0, le=10**9)
    """Checkpoints with the lowest best_metric, which are kept besides the newest."""
    best_metric: Literal["validation/ema_loss", "validation/loss", "validation/feature_distance"] = (
        "validation/ema_loss"
    )
    """What keep_best goes by: the loss on held-out images of the averaged weights, or of the raw ones
    (log.validate_every), or the distance of samples from real images (log.distance_every)."""
    copy_to: str | None = None
    """Where each checkpoint is copied to, in the background, once it is complete: a folder on another disk, or a URL
    (s3, gs and whatever fsspec writes to). A run that has lost its folder goes on from there."""
    copy_keep: int = Field(default=3, gt=0, le=10**9)
    """Newest copies that are kept, besides those that are kept for ever."""


def _number_as_text(value: Any) -> Any:
    """`--set log.samples_respacing=50` is a number to TOML."""
    return str(value) if type(value) is int else value


class LogConfig(Section):
    """What is written while training."""

    every: SpanField = Span(50, "steps")
    """Between two lines of scalars (TensorBoard, metrics.jsonl); "0 steps" for one at the end."""
    samples_every: SpanField = Span(5000, "steps")
    """Between two sample grids; "0 steps" for none."""
    samples: int = Field(default=64, gt=0, le=65_536)
    """Images in a sample grid."""
    samples_sampler: str = "ddpm"
    """How they are drawn: a sampler by its name (docs/sampling.md)."""
    samples_eta: float = 0.0
    """With samples_sampler = "ddim": 0 draws no noise, 1 is ancestral."""
    samples_respacing: Annotated[str, BeforeValidator(_number_as_text)] = "all"
    """Which timesteps they are drawn with: "all", or fewer, for example "50" (docs/sampling.md)."""
    samples_guidance: float = Field(default=1.0, ge=0)
    """Scale of classifier-free guidance by which they are drawn; 1 is without (docs/sampling.md)."""
    validate_every: SpanField = Span(0, "steps")
    """Between two measurements of the loss on images that data.holdout keeps out of training; "0 steps" for none."""
    validate_images: int = Field(default=1024, gt=0, le=10**9)
    """Most held-out images that are measured, always the same."""
    trackers: list[Literal["wandb"]] = Field(default=[])
    """Services that also receive scalars, pictures and configuration: "wandb" is Weights & Biases (docs/report.md)."""
    distance_every: SpanField = Span(0, "steps")
    """Between two measurements of how far samples of the averaged weights are from real images, by features of
    EfficientNet-Lite0 (docs/evaluation.md); "0 steps" for none."""
    distance_samples: int = Field(default=256, ge=2, le=10**6)
    """Samples that are drawn for it, and real images, held-out ones where there are any."""
    distance_steps: int = Field(default=25, ge=2, le=1_000_000)
    """Steps of DDIM by which they are drawn."""
    distance_seconds: Annotated[SecondsField, Field(gt=0)] = 60.0
    """How long drawing them may take: when it is over, the samples that there are must do."""
