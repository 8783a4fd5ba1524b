"""The sections [model]: one class for each backbone, chosen by `kind`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from typing_extensions import override

from trainer.config.kinds import Kinds
from trainer.config.section import Section


class ModelConfig(Section):
    """What the section of every backbone has."""

    kind: str
    """The backbone."""
    image_size: int = Field(gt=0, le=16_384)
    """Side of the square images in pixels; must be the dataset's."""
    channels: int = Field(default=3, gt=0, le=1024)
    """Channels of the images: 3 for RGB, 1 for grey; must be the dataset's."""

    @property
    def drops(self) -> bool:
        """Whether the network may draw random numbers in training, as dropout does; overridden where it can be told."""
        return True


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
            raise ValueError(f"label_drop = {self.label_drop}: goes with classes; set classes, or leave it out")
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
    """Number of classes of a network of this section; None where it takes no labels."""
    labelled = class_conditional(model)
    return labelled.classes if labelled is not None else None


class DDPMUNetConfig(ClassConditionalConfig):
    """The UNet of Ho et al. 2020, appendix B."""

    kind: Literal["ddpm-unet"] = "ddpm-unet"
    """The backbone."""
    base_channels: int = Field(gt=0, le=65_536)
    """Channels at full resolution."""
    channel_multipliers: list[Annotated[int, Field(le=1024)]] = Field(min_length=1, max_length=16)
    """Channels of each resolution level as a multiple of base_channels; each level halves the side."""
    blocks_per_level: int = Field(default=2, gt=0, le=64)
    """Residual blocks a level going down (one more going up)."""
    attention_resolutions: list[Annotated[int, Field(le=16_384)]] = Field(max_length=16)
    """Sides, in pixels, of the levels whose blocks are followed by self-attention."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability inside residual blocks."""
    norm_groups: int = Field(default=32, gt=0, le=65_536)
    """Groups of every GroupNorm."""

    @property
    @override
    def drops(self) -> bool:
        return self.dropout > 0


BACKBONE_SECTIONS: Kinds[ModelConfig] = Kinds("model", ModelConfig, DDPMUNetConfig)
