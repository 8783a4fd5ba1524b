"""The sections [model]: one class for each backbone, chosen by `kind`."""

from typing import Annotated, Literal

from pydantic import Field
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
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.channels, self.image_size, self.image_size

    @property
    def drops(self) -> bool:
        """Whether the network may draw random numbers in training, as dropout does; overridden where it can be told."""
        return True


class DDPMUNetConfig(ModelConfig):
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
