"""The sections [model]: one class for each backbone, chosen by `kind`."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from typing_extensions import override

from trainer.config.kinds import Kinds
from trainer.config.section import Section

AttentionOrder = Literal["legacy", "new"]


class ModelConfig(Section):
    """What the section of every backbone has."""

    kind: str
    """The backbone."""
    image_size: int = Field(gt=0, le=16_384)
    """Side of the square images in pixels; must be the dataset's."""
    channels: int = Field(default=3, gt=0, le=1024)
    """Channels of the images: 3 for RGB, 1 for grey; must be the dataset's."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.channels, self.image_size, self.image_size

    @property
    def has_dropout(self) -> bool:
        """Whether the network draws random numbers in training, as dropout does: True where the section cannot say."""
        return True

    @property
    def classifies(self) -> bool:
        """Whether the network's output is logits of classes, (B, K), not an image."""
        return False


class ClassConditionalConfig(ModelConfig):
    """What the section of a backbone has that may be given the class of each image."""

    classes: int | None = Field(default=None, gt=0, le=2**20)
    """Number of classes: the network takes each image's label, from 0 to classes - 1, which data.cond = ["label"]
    reads. Left out: it takes none."""
    label_drop: float = Field(default=0.0, ge=0, lt=1)
    """With classes: probability of the null class in place of an image's label in training, for classifier-free
    guidance (0.1, Ho and Salimans 2022); with 0 there is no null class."""

    @model_validator(mode="after")
    def _drops_labels_that_there_are(self) -> Self:
        if self.label_drop and self.classes is None:
            raise ValueError(f"label_drop = {self.label_drop:g}: goes with classes; set classes, or leave it out")
        return self

    @property
    def null_label(self) -> int | None:
        """The label of the null class; None where there is none."""
        return self.classes if self.label_drop else None

    @property
    def label_rows(self) -> int:
        """Number of labels with an embedding, the null class included; 0 where the network takes none."""
        return 0 if self.classes is None else self.classes + (self.null_label is not None)


def class_conditional(model: ModelConfig) -> ClassConditionalConfig | None:
    """The section of a network that takes labels; None for any other."""
    return model if isinstance(model, ClassConditionalConfig) and model.classes is not None else None


def classes_of(model: ModelConfig) -> int | None:
    """Number of classes of a network of this section; None where it neither takes labels nor tells them."""
    if isinstance(model, ADMClassifierConfig):
        return model.classes
    labelled = class_conditional(model)
    return labelled.classes if labelled is not None else None


class LevelsConfig(ModelConfig):
    """What networks of resolution levels, each of half the side of the one before, have in common."""

    base_channels: int = Field(gt=0, le=65_536)
    """Channels at full resolution."""
    channel_multipliers: list[Any]
    """Channels of each resolution level as a multiple of base_channels; each level halves the side."""
    blocks_per_level: int = Field(default=2, gt=0, le=64)
    """Residual blocks a level going down (one more going up)."""
    attention_resolutions: list[Annotated[int, Field(le=16_384)]] = Field(max_length=16)
    """Sides, in pixels, of the levels whose blocks are followed by self-attention."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability inside residual blocks."""
    norm_groups: int = Field(default=32, gt=0, le=65_536)
    """Groups of every GroupNorm."""

    @model_validator(mode="after")
    def _levels_are_there(self) -> Self:
        levels = len(self.channel_multipliers)
        if self.image_size % 2 ** (levels - 1):
            raise ValueError(
                f"image_size = {self.image_size}: must be a multiple of {2 ** (levels - 1)}, since {levels} levels "
                f"halve it {levels - 1} times"
            )
        for side in self.attention_resolutions:
            if side not in self.level_resolutions:
                raise ValueError(
                    f"attention_resolutions = {self.attention_resolutions}: {side} is no level's side, must be among "
                    f"{self.level_resolutions}"
                )
        return self

    @property
    def level_resolutions(self) -> list[int]:
        """Side in pixels of each level, finest first."""
        return [self.image_size // 2**level for level in range(len(self.channel_multipliers))]

    @property
    @override
    def has_dropout(self) -> bool:
        return self.dropout > 0


class DDPMUNetConfig(LevelsConfig, ClassConditionalConfig):
    """The UNet of Ho et al. 2020, appendix B."""

    kind: Literal["ddpm-unet"] = "ddpm-unet"
    """The backbone."""
    channel_multipliers: list[Annotated[int, Field(gt=0, le=1024)]] = Field(min_length=1, max_length=16)
    """Channels of each resolution level as a multiple of base_channels; each level halves the side."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.base_channels < 4 or self.base_channels % 2:
            raise ValueError(
                f"base_channels = {self.base_channels}: must be even and at least 4, for sines and cosines"
            )
        for width in self.level_channels:
            if width % self.norm_groups:
                raise ValueError(f"norm_groups = {self.norm_groups}: must divide every level's channels, here {width}")
        return self

    @property
    def level_channels(self) -> list[int]:
        """Channels of each level, finest first."""
        return [self.base_channels * multiplier for multiplier in self.channel_multipliers]


class ADMConfig(LevelsConfig):
    """What the networks of Dhariwal and Nichol 2021 have in common."""

    base_channels: int = Field(gt=0, le=65_536, multiple_of=2)
    """Channels that the levels' are multiples of; the embedding of the timestep has as many."""
    channel_multipliers: list[Annotated[float, Field(gt=0, le=1024)]] = Field(min_length=1, max_length=16)
    """Channels of each resolution level as a multiple of base_channels, perhaps a fraction; each level halves the
    side."""
    heads: int | None = Field(default=None, gt=0, le=65_536)
    """Heads of every attention, of whatever width; either this or head_channels."""
    head_channels: int | None = Field(default=None, gt=0, le=65_536)
    """Channels of every head, of which wide levels have more; either this or heads."""
    attention_order: AttentionOrder = "legacy"
    """How queries, keys and values lie in the weights: "legacy" by heads, as in most published ones, or "new" by
    kinds. Either trains the same network."""
    resblock_updown: bool = True
    """Residual blocks lead from level to level; otherwise a convolution does."""

    @property
    def level_channels(self) -> list[int]:
        """Channels of each level, finest first."""
        return [round(self.base_channels * multiplier) for multiplier in self.channel_multipliers]

    def heads_of(self, channels: int) -> int:
        """The number of heads of an attention over so many channels."""
        if self.heads is not None:
            return self.heads
        assert self.head_channels is not None
        return channels // self.head_channels

    @model_validator(mode="after")
    def _agree(self) -> Self:
        levels = list(zip(self.level_channels, self.level_resolutions, strict=True))
        for multiplier, (width, _) in zip(self.channel_multipliers, levels, strict=True):
            if not math.isclose(width, self.base_channels * multiplier) or width % self.norm_groups:
                raise ValueError(
                    f"channel_multipliers = {self.channel_multipliers}: {multiplier:g} times base_channels = "
                    f"{self.base_channels} must be a multiple of norm_groups = {self.norm_groups}"
                )
        if (self.heads is None) == (self.head_channels is None):
            raise ValueError("should have either heads or head_channels")
        part, name = (self.heads, "heads") if self.heads is not None else (self.head_channels, "head_channels")
        attended = [width for width, side in levels if side in self.attention_resolutions]
        for width in [*attended, levels[-1][0]]:  # the middle always attends
            if part is not None and width % part:
                raise ValueError(f"{name} = {part}: must divide the {width} channels of a level with attention")
        return self


class ADMUNetConfig(ADMConfig, ClassConditionalConfig):
    """The UNet of Dhariwal and Nichol 2021 (docs/adm.md)."""

    kind: Literal["adm-unet"] = "adm-unet"
    """The backbone."""
    low_res_size: int | None = Field(default=None, gt=0, le=16_384)
    """Side of a smaller image of the same channels that the network upsamples: what data.cond = ["low_res"] reads, or
    else the image itself, averaged over blocks of pixels. Left out: there is none (docs/cascades.md)."""
    low_res_noise: float = Field(default=0.0, ge=0, le=1)
    """With low_res_size: in training the smaller image is noised to a level from 0 to this one, drawn for each image,
    which is an input of the network (Ho et al. 2022, section 4.2); 0 is without, 1 up to noise alone."""

    @model_validator(mode="after")
    def _upsamples(self) -> Self:
        if self.low_res_size is not None and self.low_res_size >= self.image_size:
            raise ValueError(f"low_res_size = {self.low_res_size}: must be less than image_size = {self.image_size}")
        if self.low_res_noise and self.low_res_size is None:
            raise ValueError(f"low_res_noise = {self.low_res_noise:g}: goes with low_res_size; set it, or leave it out")
        return self


class ADMClassifierConfig(ADMConfig):
    """The classifier of noisy images of Dhariwal and Nichol 2021: their UNet's encoder and a pool (docs/adm.md)."""

    kind: Literal["adm-classifier"] = "adm-classifier"
    """The backbone."""
    classes: int = Field(gt=1, le=2**20)
    """Number of classes: images have labels from 0 to classes - 1, which data.cond = ["label"] reads."""
    pool: Literal["attention", "adaptive", "spatial"] = "attention"
    """How the pixels' features become one: "attention" over them, as in the published classifiers; "adaptive", their
    mean; "spatial", the means of every block's output, and two dense layers."""

    @property
    @override
    def classifies(self) -> bool:
        return True


def upsampler(model: ModelConfig) -> ADMUNetConfig | None:
    """The section of a network that upsamples; None for any other."""
    return model if isinstance(model, ADMUNetConfig) and model.low_res_size is not None else None


BACKBONE_SECTIONS: Kinds[ModelConfig] = Kinds("model", ModelConfig, DDPMUNetConfig, ADMUNetConfig, ADMClassifierConfig)
