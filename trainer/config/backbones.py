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
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
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
    channel_multipliers: list[Annotated[int, Field(gt=0, le=1024)]] = Field(min_length=1, max_length=16)
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
    def _agree(self) -> Self:
        if self.base_channels < 4 or self.base_channels % 2:
            raise ValueError(
                f"base_channels = {self.base_channels}: must be even and at least 4, for sines and cosines"
            )
        for width in self.level_channels:
            if width % self.norm_groups:
                raise ValueError(f"norm_groups = {self.norm_groups}: must divide every level's channels, here {width}")
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
    def level_channels(self) -> list[int]:
        """Channels of each level, finest first."""
        return [self.base_channels * multiplier for multiplier in self.channel_multipliers]

    @property
    def level_resolutions(self) -> list[int]:
        """Side in pixels of each level, finest first."""
        return [self.image_size // 2**level for level in range(len(self.channel_multipliers))]

    @property
    @override
    def drops(self) -> bool:
        return self.dropout > 0


BACKBONE_SECTIONS: Kinds[ModelConfig] = Kinds("model", ModelConfig, DDPMUNetConfig)
