"""Typed configuration: one TOML file, every field documented, validated once, saved with the run as resolved."""

import difflib
import re
import tomllib
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, model_validator
from pydantic_core import ErrorDetails

from trainer.errors import ConfigError

_SUFFIXES = {"": 1, "k": 10**3, "M": 10**6}
_SPAN = re.compile(r"\s*([\d_]+(?:\.\d+)?)\s*([kM]?)\s*(steps?|images?)\s*")


class Span:
    """A stretch of training, counted in optimizer steps or in images: "800k steps", "51.2M images"."""

    def __init__(self, count: int, unit: Literal["steps", "images"]) -> None:
        self.count = count
        self.unit = unit

    @classmethod
    def parse(cls, text: Any) -> "Span":
        """Read "5000 steps", "2.4M steps" or "51_200 images"; raises ValueError for anything else."""
        if isinstance(text, Span):
            return text
        match = _SPAN.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError('a span of training is written like "5000 steps", "2.4M steps" or "51.2M images"')
        number, suffix, unit = match.groups()
        count = Decimal(number.replace("_", "")) * _SUFFIXES[suffix]
        if count != int(count):
            raise ValueError(f"{count} {unit} is no whole number of {unit}")
        return cls(int(count), "steps" if unit.startswith("step") else "images")

    def images(self, global_batch: int) -> int:
        """The span in images, whatever it was written in."""
        return self.count * global_batch if self.unit == "steps" else self.count

    def steps(self, global_batch: int) -> int:
        """The span in whole optimizer steps, rounded up."""
        return -(-self.images(global_batch) // global_batch)

    def is_due(self, position: int, global_batch: int) -> bool:
        """Whether the step that ended at `position` (images consumed) completed one more of this span; 0 is never."""
        images = self.images(global_batch)
        return images > 0 and position // images > (position - global_batch) // images

    def __str__(self) -> str:
        return f"{self.count} {self.unit}"

    def __repr__(self) -> str:
        return f"Span({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Span) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))


SpanField = Annotated[Span, BeforeValidator(Span.parse), PlainSerializer(str)]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True, use_attribute_docstrings=True
    )


class DataConfig(_Section):
    """What is trained on."""

    path: str
    """Folder that data_prep wrote: tar shards, index and manifest."""
    flip: bool
    """Mirror each image left to right with probability 1/2."""
    workers: int = Field(default=4, ge=0)
    """Loader processes for each rank; 0 reads and decodes in the training process."""
    prefetch: int = Field(default=4, ge=1)
    """Micro-batches that each loader process keeps ready."""


class ModelConfig(_Section):
    """The UNet of Ho et al. 2020, appendix B."""

    image_size: int = Field(gt=0)
    """Side of the square images in pixels; must be the dataset's."""
    channels: int = Field(default=3, gt=0)
    """Channels of the images: 3 for RGB, 1 for grey; must be the dataset's."""
    base_channels: int = Field(gt=0)
    """Channels at full resolution."""
    channel_multipliers: list[int] = Field(min_length=1)
    """Channels of each resolution level as a multiple of base_channels; each level halves the side."""
    blocks_per_level: int = Field(default=2, gt=0)
    """Residual blocks a level going down (one more going up)."""
    attention_resolutions: list[int]
    """Sides, in pixels, of the levels whose blocks are followed by self-attention."""
    dropout: float = Field(ge=0, lt=1)
    """Dropout probability inside residual blocks."""
    norm_groups: int = Field(default=32, gt=0)
    """Groups of every GroupNorm."""


class DiffusionConfig(_Section):
    """The forward process, what the network predicts of it, and the loss (Ho et al. 2020, table 2)."""

    timesteps: int = Field(default=1000, gt=1)
    """T, the number of noise levels."""
    schedule: Literal["linear", "cosine", "sqrt-linear", "sigmoid", "table"] = "linear"
    """beta_t: "linear" 1e-4 to 0.02 (Ho et al. 2020; times 1000 / T), "cosine" (Nichol and Dhariwal 2021),
    "sqrt-linear", "sigmoid", or "table"."""
    betas: list[Annotated[float, Field(gt=0, lt=1)]] | None = None
    """With schedule "table": beta_t for every t."""
    prediction: Literal["eps", "x0", "mu", "v"] = "eps"
    """What the network predicts: "eps", "x0", "mu" (the posterior's mean) or "v" (Salimans and Ho 2022)."""
    variance: Literal["small", "large", "learned", "learned-range"]
    """Variance of the reverse process: "small" beta~_t or "large" beta_t (section 3.2); "learned", a diagonal one, or
    "learned-range", between the two fixed ones (Nichol and Dhariwal 2021), doubles the network's output."""
    loss: Literal["mse", "bound", "hybrid"] = "mse"
    """The "mse" of the prediction (with "eps" it is L_simple), "bound" (L, the variational bound, in bits per
    dimension), or "hybrid" (L_simple + 0.001 L_vlb; Nichol and Dhariwal 2021)."""
    timestep_sampling: Literal["uniform", "importance"] = "uniform"
    """How t is drawn: "importance" as often as its loss is large (Nichol and Dhariwal 2021, section 3.3)."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.schedule == "table") != (self.betas is not None):
            raise ValueError('schedule = "table" and betas go together')
        if self.betas is not None and len(self.betas) != self.timesteps:
            raise ValueError(f"betas has {len(self.betas)} values, timesteps is {self.timesteps}")
        learns = self.variance in ("learned", "learned-range")
        if self.loss == "mse" and learns:
            raise ValueError(f'loss = "mse" does not teach variance = "{self.variance}"; take "bound" or "hybrid"')
        if self.loss == "hybrid" and self.variance != "learned-range":
            raise ValueError('loss = "hybrid" is for variance = "learned-range"')
        return self


class OptimizerConfig(_Section):
    """Adam, as in appendix B."""

    learning_rate: float = Field(gt=0)
    """Learning rate after the warm-up."""
    warmup: SpanField
    """Linear warm-up from 0; "0 steps" for none."""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    """Decay rates of Adam's two moments."""
    eps: float = Field(default=1e-8, gt=0)
    """Adam's epsilon."""
    clip_norm: float = Field(default=1.0, gt=0)
    """The gradient's global norm is clipped to this; inf never clips."""


class TrainConfig(_Section):
    """How long and how."""

    duration: SpanField
    """Length of the whole run, restarts included."""
    global_batch: int = Field(gt=0)
    """Images in one optimizer step, over all ranks and accumulated micro-batches."""
    micro_batch: int | None = Field(default=None, gt=0)
    """Most images that a device holds at once; the rest of its share is accumulated. Left out: its whole share."""
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    """Decay of the exponential moving average of the weights, applied every step."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the network; weights, loss, optimizer and schedule stay in float32."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    max_nonfinite_steps: int = Field(default=10, ge=0)
    """Steps of a run that may be skipped and dumped for a NaN or infinity in loss or gradient; one more ends it."""


class CheckpointConfig(_Section):
    """When the state is saved and what is kept."""

    every: SpanField
    """Between two checkpoints; "0 steps" saves only at the end or when stopped."""
    keep: int = Field(default=3, gt=0)
    """Newest checkpoints that are kept."""
    keep_every: SpanField = Span(0, "steps")
    """Besides the newest, one for every such span is kept for ever; "0 steps" for none."""


class LogConfig(_Section):
    """What is written while training."""

    every: SpanField
    """Between two lines of scalars (TensorBoard, metrics.jsonl); "0 steps" for one at the end."""
    samples_every: SpanField
    """Between two sample grids; "0 steps" for none."""
    samples: int = Field(default=64, gt=0)
    """Images in a sample grid."""


class Config(_Section):
    """A run, whole."""

    run_dir: str
    """Folder of the run: everything that training writes lies in it."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Keys the order, flips, t, noise, dropout, initial weights and samples."""
    data: DataConfig
    model: ModelConfig
    diffusion: DiffusionConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    log: LogConfig

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> Self:
        """Read a TOML file and apply overrides such as "train.global_batch=64".

        Raises ConfigError with one line for each field that is unknown, missing or invalid.
        """
        try:
            raw = tomllib.loads(path.read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read ({error})") from error
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path}: not valid TOML: {error}") from error
        return cls.parse(raw, overrides, source=str(path))

    @classmethod
    def parse(cls, raw: dict[str, Any], overrides: Sequence[str] = (), *, source: str) -> Self:
        """Validate what a TOML file would hold, overrides applied to it; errors as `load`, from `source`."""
        for override in overrides:
            _apply_override(raw, override)
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            lines = [_explain(cls, details) for details in error.errors()]
            raise ConfigError(f"{source}: " + "; ".join(lines)) from error

    def to_toml(self) -> str:
        """The configuration as resolved: every field, defaults included."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    *sections, name = key.strip().split(".")
    if not separator or not all([*sections, name]):
        raise ConfigError(f"--set {override}: write it as section.name=value, for example train.global_batch=64")
    table = raw
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override}: {section} is a value, not a section")
    try:
        table[name] = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        table[name] = text.strip()  # an unquoted string: a path, a span, a name


def _explain(model: type[BaseModel], details: ErrorDetails) -> str:
    *sections, name = [str(part) for part in details["loc"] if not isinstance(part, int)]
    field = ".".join([*sections, name])
    if details["type"] == "extra_forbidden":
        known = _section(model, sections).model_fields
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known here: {', '.join(known)}"
        return f"{field}: unknown key; {hint}"
    if details["type"] == "missing":
        return f"{field}: missing"
    message = details["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    return f"{field}: {message}" if isinstance(details["input"], dict) else f"{field} = {details['input']!r}: {message}"


def _section(model: type[BaseModel], sections: list[str]) -> type[BaseModel]:
    for name in sections:
        annotation = model.model_fields[name].annotation
        assert isinstance(annotation, type)
        model = annotation
    return model
