"""Typed configuration: one TOML file, every field documented, validated once, saved with the run as resolved."""

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Self, TypeVar

import tomli_w
from pydantic import Field, ValidationError, create_model, field_validator, model_validator

from trainer.config.backbones import (
    BACKBONE_SECTIONS,
    ADMClassifierConfig,
    ADMUNetConfig,
    DDPMUNetConfig,
    ModelConfig,
    upsampler,
)
from trainer.config.families import FAMILY_SECTIONS, ClassifierConfig, DDPMConfig, DiffusionConfig
from trainer.config.reading import apply_override, explain, read_toml
from trainer.config.section import Section
from trainer.config.sections import AdamConfig, CheckpointConfig, DataConfig, LogConfig, OptimizerConfig, TrainConfig
from trainer.errors import ConfigError

__all__ = [
    "ADMClassifierConfig",
    "ADMUNetConfig",
    "AdamConfig",
    "CheckpointConfig",
    "ClassifierConfig",
    "Config",
    "DDPMConfig",
    "DDPMUNetConfig",
    "DataConfig",
    "DiffusionConfig",
    "LogConfig",
    "ModelConfig",
    "OptimizerConfig",
    "TrainConfig",
]

C = TypeVar("C", bound="Config")


class Config(Section):
    """A run, whole."""

    run_dir: str
    """Folder of the run: everything that training writes lies in it."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Keys the order, flips, t, noise, dropout, initial weights and samples."""
    data: DataConfig
    model: ModelConfig
    diffusion: DiffusionConfig = DDPMConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @field_validator("run_dir")
    @classmethod
    def _is_a_path(cls, run_dir: str) -> str:
        if not run_dir.strip() or "\0" in run_dir:  # "" would be the folder that one happens to be in
            raise ValueError("should be the path of a folder")
        return run_dir

    @model_validator(mode="after")
    def _agree(self) -> Self:
        self._check_classifier()
        validate_every = self.log.validate_every
        if validate_every.count and not self.data.holdout:
            raise ValueError(f'log.validate_every = "{validate_every}": needs images to validate on; set data.holdout')
        self._check_that_low_res_can_be_made()
        if self.checkpoint.keep_best:
            self._check_that_all_are_scored()
        return self

    def _check_classifier(self) -> None:
        model, diffusion = self.model, self.diffusion
        if model.classifies != diffusion.classifies:
            raise ValueError(
                f'model.kind = "{model.kind}", diffusion.kind = "{diffusion.kind}": a classifier has '
                'model.kind = "adm-classifier" and diffusion.kind = "classifier", everything else neither'
            )
        for field in ("samples_every", "distance_every"):
            every = getattr(self.log, field)
            if model.classifies and every.count:
                raise ValueError(f'log.{field} = "{every}": a classifier draws no samples; set "0 steps"')

    def _check_that_low_res_can_be_made(self) -> None:
        model = upsampler(self.model)
        if model is None or model.low_res_size is None or "low_res" in self.data.cond:
            return
        if model.image_size % model.low_res_size:
            raise ValueError(
                f"model.low_res_size = {model.low_res_size}: must divide model.image_size = {model.image_size}, since "
                'low_res is made from the image; or have stored ones read by data.cond = ["low_res"]'
            )

    def _check_that_all_are_scored(self) -> None:
        by_distance = self.checkpoint.best_metric == "validation/feature_distance"
        field, means = ("distance_every", "") if by_distance else ("validate_every", " and data.holdout")
        every, scored, batch = self.checkpoint.every, getattr(self.log, field), self.train.global_batch
        keep = f"checkpoint.keep_best = {self.checkpoint.keep_best}"
        if not scored.count:
            raise ValueError(f"{keep}: needs a score for each checkpoint; set log.{field}{means}")
        if every.images(batch) % scored.images(batch):
            raise ValueError(
                f'{keep}: needs a score for each checkpoint, so checkpoint.every = "{every}" should be a multiple '
                f'of log.{field} = "{scored}"'
            )

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> Self:
        """Read a TOML file, or a shipped one by its name, and apply overrides such as "train.global_batch=64".

        Raises ConfigError with one line for each field that is unknown, missing or invalid.
        """
        return cls.parse(read_toml(path), overrides, source=str(path))

    @classmethod
    def parse(cls, raw: dict[str, Any], overrides: Sequence[str] = (), *, source: str) -> Self:
        """Validate what a TOML file would hold, overrides applied to it; errors as `load`, from `source`."""
        for override in overrides:
            apply_override(raw, override)
        try:
            whole = cls.of_kinds(_kind(raw, "model"), _kind(raw, "diffusion"))
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from error
        try:
            return whole.model_validate(raw)
        except ValidationError as error:
            lines = [explain(whole, details) for details in error.errors()]
            raise ConfigError(f"{source}: " + "; ".join(lines)) from error

    @classmethod
    def of_kinds(cls, model_kind: Any, diffusion_kind: Any) -> type[Self]:
        """Configurations whose [model] and [diffusion] are of these kinds, None for the default one.

        Raises ConfigError for a kind that is not known.
        """
        return _narrowed(cls, BACKBONE_SECTIONS.of(model_kind), FAMILY_SECTIONS.of(diffusion_kind))

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle, which does not find the classes of `of_kinds` by their name."""
        return partial(Config.parse, source="a configuration of another process"), (self.model_dump(exclude_none=True),)

    def to_toml(self) -> str:
        """The configuration as resolved: every field, defaults included."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))


@cache
def _narrowed(base: type[C], model: type[ModelConfig], diffusion: type[DiffusionConfig]) -> type[C]:
    """`base` with these classes for [model] and [diffusion], so that pydantic validates and names their fields."""
    required = any(field.is_required() for field in diffusion.model_fields.values())
    default = ... if required else diffusion.model_validate({})
    sections: dict[str, Any] = {"model": (model, ...), "diffusion": (diffusion, default)}
    return create_model(base.__name__, __base__=base, __doc__=base.__doc__, **sections)


def _kind(raw: dict[str, Any], section: str) -> Any:
    table = raw.get(section)
    return table.get("kind") if isinstance(table, dict) else None
