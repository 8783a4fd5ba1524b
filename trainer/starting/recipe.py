"""What suits images of a size and a number, from the settings that papers used for the nearest ones.

DDPM: Ho et al. 2020, appendix B. Improved DDPM: Nichol and Dhariwal 2021, appendix A. ADM: Dhariwal and Nichol 2021,
appendix I.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from trainer.config import DDPMUNetConfig
from trainer.engine.network.cost import cost_of
from trainer.errors import ConfigError
from trainer.models.backbones import example_inputs
from trainer.models.ddpm_unet import UNet

_CPU_FLOPS = 8e12  # of a first run without a GPU: three minutes of two cores that have nothing else to do
_FEWEST_STEPS, _MOST_IMAGES = 10_000, 102_400_000  # the latter are DDPM's for CIFAR-10


class Setting(NamedTuple):
    """A field's value, and where it comes from."""

    value: Any
    why: str = ""


Settings = dict[str, dict[str, Setting]]
"""By section and field, in the order of a configuration."""


@dataclass(frozen=True, kw_only=True)
class _Published:
    """What a paper trained images of a side with."""

    side: int
    who: str
    multipliers: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]
    schedule: Setting
    learning_rate: float
    batch: Setting
    micro_batch: int | None
    epochs: Setting


_LINEAR = Setting("linear", "DDPM, section 4")
_CIFAR_EPOCHS = Setting(2048, "DDPM's for CIFAR-10: 800k steps of 128")
_CELEBA_EPOCHS = Setting(1067, "DDPM's for CelebA-HQ: 500k steps of 64")
_PUBLISHED = (
    _Published(
        side=32,
        who="DDPM, CIFAR-10",
        multipliers=(1, 2, 2, 2),
        blocks=2,
        attention=(16,),
        schedule=_LINEAR,
        learning_rate=2e-4,
        batch=Setting(128, "DDPM, CIFAR-10"),
        micro_batch=None,
        epochs=_CIFAR_EPOCHS,
    ),
    _Published(
        side=64,
        who="Improved DDPM, ImageNet 64 x 64",
        multipliers=(1, 2, 3, 4),
        blocks=3,
        attention=(16, 8),
        schedule=Setting("cosine", "Improved DDPM: better than linear at 64 x 64"),
        learning_rate=1e-4,
        batch=Setting(128, "Improved DDPM, ImageNet 64 x 64"),
        micro_batch=None,
        epochs=_CIFAR_EPOCHS,
    ),
    _Published(
        side=128,
        who="ADM, ImageNet 128 x 128",
        multipliers=(1, 1, 2, 3, 4),
        blocks=2,
        attention=(32, 16, 8),
        schedule=_LINEAR,
        learning_rate=1e-4,
        batch=Setting(128, "half of ADM's"),
        micro_batch=32,
        epochs=_CELEBA_EPOCHS,
    ),
    _Published(
        side=256,
        who="DDPM, 256 x 256",
        multipliers=(1, 1, 2, 2, 4, 4),
        blocks=2,
        attention=(16,),
        schedule=_LINEAR,
        learning_rate=2e-5,
        batch=Setting(64, "DDPM, 256 x 256"),
        micro_batch=16,
        epochs=_CELEBA_EPOCHS,
    ),
)


def recipe(*, image_size: int, channels: int, images: int, gpu: bool) -> Settings:
    """What to train so many images of a size with: on GPUs as the papers did, or on a CPU in minutes.

    Of [data] only how it is augmented and read. Raises ConfigError where the size cannot be halved often enough for
    attention to look over the whole image.
    """
    published = min(_PUBLISHED, key=lambda row: max(row.side, image_size) / min(row.side, image_size))
    model = _model(published, image_size, channels, images, gpu=gpu)
    training = _on_gpu(published, images) if gpu else _on_cpu(model)
    steps, why = training["train"]["duration"]
    training["train"]["duration"] = Setting(f"{steps} steps", why)
    diffusion = {"schedule": published.schedule, "variance": Setting("small", "DDPM at 256 x 256")}
    if not gpu:
        diffusion["timesteps"] = Setting(200, "ours: each image takes so many steps to draw; the papers' are 1000")
    flip = Setting(True, "DDPM: on all but LSUN bedroom; false where left and right differ, as in letters")
    return {
        "data": {"flip": flip} if gpu else {"flip": flip, "workers": Setting(1)},
        "model": model,
        "diffusion": diffusion,
        **training,
        "checkpoint": {"every": Setting(f"{min(5000, max(1, steps // 5))} steps")},
        "log": {
            "every": Setting(f"{50 if gpu else 10} steps"),
            "samples_every": Setting(
                f"{min(20_000, max(1, steps // 5)) if gpu else steps} steps", "grids in RUN/samples"
            ),
            "samples": Setting(64 if gpu and image_size <= 64 else 16),
        },
    }


def _model(published: _Published, side: int, channels: int, images: int, *, gpu: bool) -> dict[str, Setting]:
    multipliers = _levels(published, side)
    sides = [side >> level for level in range(len(multipliers))]
    if not gpu:
        width = Setting(16, "ours: an eighth of the papers', for a CPU")
    elif images >= 10_000:
        width = Setting(128, f"DDPM, whose smallest set has 30,000 images; here are {images:,}")
    else:
        width = Setting(64, f"ours: half of DDPM's 128, whose smallest set has 30,000 images; here are {images:,}")
    # The sides of other sizes are not the paper's: those levels that lie nearest to its own.
    attention = sorted(
        {min(sides, key=lambda each: abs(each - wanted)) for wanted in published.attention}, reverse=True
    )
    settings = {
        "image_size": Setting(side, "the data's"),
        "channels": Setting(channels, "the data's"),
        "base_channels": width,
        "channel_multipliers": Setting(
            multipliers, f"{published.who}: {sides[0]} x {sides[0]} to {sides[-1]} x {sides[-1]}"
        ),
        "blocks_per_level": Setting(published.blocks, published.who) if gpu else Setting(1, "ours, for a CPU"),
        "attention_resolutions": Setting(attention, published.who)
        if gpu
        else Setting(attention[-1:], "ours, for a CPU"),
        "dropout": _dropout(side, images) if gpu else Setting(0.0, "such a run is too short to learn images by heart"),
    }
    if not gpu:
        settings["norm_groups"] = Setting(8, "ours: 32 would leave less than a channel to a group")
    return settings


def _levels(published: _Published, side: int) -> list[int]:
    """The paper's multipliers, one for each level: more of the first at larger sides, fewer where halving ends."""
    multipliers = list(published.multipliers)
    lowest = published.side >> (len(multipliers) - 1)
    while side >> (len(multipliers) - 1) > 2 * lowest:
        multipliers.insert(0, multipliers[0])
    while len(multipliers) > 1 and (side % (1 << (len(multipliers) - 1)) or side >> (len(multipliers) - 1) < 4):
        multipliers.pop()
    if side >> (len(multipliers) - 1) > 32:
        step = 1 << (len(published.multipliers) - 1)
        nearest = max(step, round(side / step) * step)
        raise ConfigError(
            f"images of {side} x {side}: {side} cannot be halved often enough for a network; prepare them with "
            f"--size {nearest}"
        )
    return multipliers


def _dropout(side: int, images: int) -> Setting:
    if images >= 100_000 or (side > 128 and images >= 10_000):
        return Setting(0.0, "DDPM: none on LSUN and CelebA-HQ")
    if images >= 10_000:
        return Setting(0.1, "DDPM: 0.1 on CIFAR-10, 50,000 images")
    return Setting(0.2, "ours: above DDPM's 0.1 on 50,000 images, below Improved DDPM's 0.3, for a small set")


def _on_gpu(published: _Published, images: int) -> dict[str, dict[str, Setting]]:
    batch, epochs = published.batch, published.epochs
    steps = _rounded(max(_FEWEST_STEPS, min(_MOST_IMAGES, epochs.value * images) / batch.value))
    why = f"{steps * batch.value / images:,.0f} epochs; {epochs.value:,} are {epochs.why}"
    train = {"duration": Setting(steps, why), "global_batch": batch}
    if published.micro_batch is not None:
        train["micro_batch"] = Setting(published.micro_batch, "ours: what a GPU holds at once; see --find-batch")
    train |= _average(steps)
    train["precision"] = Setting("bf16", 'ours: faster on GPUs since Ampere; "fp32" elsewhere')
    warmup = min(5000, steps // 20)
    return {
        "optimizer": {
            "learning_rate": Setting(published.learning_rate, published.who),
            "warmup": Setting(f"{warmup} steps", "DDPM's code: 5000, of runs of 500k steps and more"),
        },
        "train": train,
    }


def _on_cpu(model: dict[str, Setting]) -> dict[str, dict[str, Setting]]:
    config = DDPMUNetConfig.model_validate({name: value for name, (value, _) in model.items()})
    batch = 8
    flops = cost_of(lambda: UNet(config, config.channels), partial(example_inputs, config)).training_flops
    affordable = _CPU_FLOPS / (batch * flops)
    steps = _rounded(min(5000, max(100, affordable)))
    long = "ours: some minutes on two cores" if affordable >= 100 else "ours: too few to learn from; take a GPU"
    return {
        "optimizer": {
            "learning_rate": Setting(1e-3, "ours: a small network and a short run ask for larger steps"),
            "warmup": Setting(f"{steps // 20} steps"),
        },
        "train": {
            "duration": Setting(steps, f"{long}; raise it to go on"),
            "global_batch": Setting(batch, "ours, for a CPU"),
            **_average(steps),
        },
    }


def _average(steps: int) -> dict[str, Setting]:
    """The average of the weights remembers a tenth of the run, and no more than the paper's 10,000 steps."""
    if steps >= 100_000:
        return {"ema_decay": Setting(0.9999, "DDPM, appendix B")}
    decay = round(1 - 10 / steps, 5)
    return {"ema_decay": Setting(decay, "ours: a tenth of this run; DDPM's 0.9999 would remember 10,000 steps")}


def _rounded(count: float) -> int:
    """Two digits of it."""
    scale = 10 ** max(0, len(str(int(count))) - 2)
    return round(count / scale) * scale
