"""Settings of diffusers' UNet2DModel and DDPMScheduler that are equivalent to this network and this process.

A setting missing in a config.json has diffusers' default, which often differs from the paper's.
"""

from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from trainer.config import DDPMConfig
from trainer.diffusion.ddpm.schedules import ScheduleName, cosine_betas, make_betas
from trainer.errors import ConversionError, brief
from trainer.models.ddpm_unet import UNet
from trainer.models.layers import GROUP_NORM_EPS

# Settings that are fixed in this network: field -> (required value, diffusers' default).
_FIXED: dict[str, tuple[Any, Any]] = {
    "center_input_sample": (False, False),
    "time_embedding_type": ("positional", "positional"),
    "time_embedding_dim": (None, None),
    "freq_shift": (1, 0),
    "flip_sin_to_cos": (False, True),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2D"),
    "mid_block_scale_factor": (1, 1),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "conv"),
    "upsample_type": ("conv", "conv"),
    "act_fn": ("silu", "silu"),
    "attention_head_dim": (None, 8),
    "attn_norm_num_groups": (None, None),
    "norm_eps": (GROUP_NORM_EPS, 1e-5),
    "resnet_time_scale_shift": ("default", "default"),
    "add_attention": (True, True),
    "class_embed_type": (None, None),
    "num_class_embeds": (None, None),
}
# Settings that are converted, with diffusers' default where there is one.
_READ: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (224, 448, 672, 896),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "dropout": 0.0,
    "norm_num_groups": 32,
}
_MOST_LEVELS = 16
_MOST_TIMESTEPS = 1_000_000
_WITHOUT_EFFECT = {"num_train_timesteps"}  # for the type of embedding in use
_DOWN_BLOCKS = {"DownBlock2D": False, "AttnDownBlock2D": True}
_UP_BLOCKS = {"UpBlock2D": False, "AttnUpBlock2D": True}

# Ours -> diffusers'. Predicting mu~ has no equivalent; diffusers' "learned" is the variance, ours its logarithm.
_PREDICTION_TYPE = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
_VARIANCE_TYPE = {"small": "fixed_small", "large": "fixed_large", "learned-range": "learned_range"}
# Settings that are fixed in this sampler, as above. The timesteps of shorter chains are chosen by the caller in both.
_FIXED_SCHEDULER: dict[str, tuple[Any, Any]] = {
    "clip_sample": (True, True),
    "clip_sample_range": (1.0, 1.0),
    "thresholding": (False, False),
    "rescale_betas_zero_snr": (False, False),
}
_BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def unet_settings(network: UNet) -> dict[str, Any]:
    """The config.json of the equivalent UNet2DModel.

    Raises ConversionError with the field's name where there is none.
    """
    config = network.config
    if config.classes is not None:
        raise ConversionError("model.classes: a network that takes labels cannot be exported; leave it in its run")
    if config.channel_multipliers[0] != 1:
        raise ConversionError(
            f"model.channel_multipliers = {config.channel_multipliers}: in diffusers the first level is as wide "
            "as the first convolution, so only a network whose first multiplier is 1 can be exported"
        )
    attention = [side in config.attention_resolutions for side in config.level_resolutions]
    return {
        "_class_name": "UNet2DModel",
        "sample_size": config.image_size,
        "in_channels": config.channels,
        "out_channels": network.conv_out.out_channels,
        "block_out_channels": config.level_channels,
        "down_block_types": ["AttnDownBlock2D" if here else "DownBlock2D" for here in attention],
        "up_block_types": ["AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attention)],
        "layers_per_block": config.blocks_per_level,
        "dropout": config.dropout,
        "norm_num_groups": config.norm_groups,
        **{field: needed for field, (needed, _) in _FIXED.items()},
    }


def model_section(settings: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """The [model] section for a UNet2DModel's config.json.

    Raises ConversionError with the setting's name where this network does not support it.
    """
    if settings.get("_class_name") != "UNet2DModel":
        raise ConversionError(f"{source}: _class_name = {brief(settings.get('_class_name'))}: should be 'UNet2DModel'")
    _refuse_others(settings, _FIXED, source)
    known = _FIXED.keys() | _READ.keys() | _WITHOUT_EFFECT
    for field, value in settings.items():
        if field not in known and not field.startswith("_") and value is not None:
            raise ConversionError(f"{source}: {field} = {brief(value)}: a setting that this network does not have")

    read = {field: settings.get(field, default) for field, default in _READ.items()}
    try:
        return _model_section(read, source)
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise ConversionError(f"{source}: describes no UNet2DModel ({error})") from error


def _model_section(read: Mapping[str, Any], source: str) -> dict[str, Any]:
    def refuse(field: str, right: str) -> ConversionError:
        return ConversionError(f"{source}: {field} = {brief(read[field])}: {right}")

    size = read["sample_size"]
    if isinstance(size, list) and len(set(size)) == 1:
        size = size[0]
    if not isinstance(size, int):
        raise refuse("sample_size", "should be the side of square images")
    if read["out_channels"] not in (read["in_channels"], 2 * read["in_channels"]):
        raise refuse("out_channels", f"should be in_channels, {read['in_channels']}, or twice as many")
    widths = list(read["block_out_channels"])
    if len(widths) > _MOST_LEVELS:
        raise refuse("block_out_channels", f"should be at most {_MOST_LEVELS}, one a level")
    if any(width % widths[0] for width in widths):
        raise refuse("block_out_channels", f"each should be a multiple of the first, {widths[0]}")
    if list(read["down_block_types"]) != [kind for kind in read["down_block_types"] if kind in _DOWN_BLOCKS]:
        raise refuse("down_block_types", f"each should be one of {', '.join(_DOWN_BLOCKS)}")
    attention = [_DOWN_BLOCKS[kind] for kind in read["down_block_types"]]
    if len(attention) != len(widths):
        raise refuse("down_block_types", f"should be as many as block_out_channels, {len(widths)}")
    if [_UP_BLOCKS.get(kind) for kind in read["up_block_types"]] != attention[::-1]:
        raise refuse("up_block_types", "should have attention where down_block_types have it, in reverse order")
    return {
        "image_size": size,
        "channels": read["in_channels"],
        "base_channels": widths[0],
        "channel_multipliers": [width // widths[0] for width in widths],
        "blocks_per_level": read["layers_per_block"],
        "attention_resolutions": [size // 2**level for level, here in enumerate(attention) if here],
        "dropout": float(read["dropout"]),
        "norm_groups": read["norm_num_groups"],
    }


def scheduler_settings(process: DDPMConfig) -> dict[str, Any]:
    """The scheduler_config.json of a DDPMScheduler equivalent to our ancestral sampler.

    DDIMScheduler reads it too. "leading" timestep spacing is the only one whose distances are those assumed by its
    step() for any number of steps; over all T steps every spacing is the same.
    """
    for field, value, known in (
        ("prediction", process.prediction, _PREDICTION_TYPE),
        ("variance", process.variance, _VARIANCE_TYPE),
    ):
        if value not in known:
            raise ConversionError(
                f"diffusion.{field} = {value!r}: has no like in diffusers; can be exported: {', '.join(known)}"
            )
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": process.timesteps,
        **_beta_settings(make_betas(process.schedule, process.timesteps, process.betas)),
        "prediction_type": _PREDICTION_TYPE[process.prediction],
        "variance_type": _VARIANCE_TYPE[process.variance],
        "timestep_spacing": "leading",
        "steps_offset": 0,
        "set_alpha_to_one": True,  # used by DDIMScheduler: abar before the first timestep is 1
        **{field: needed for field, (needed, _) in _FIXED_SCHEDULER.items()},
    }


def diffusion_section(settings: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """The [diffusion] section for a DDPMScheduler's or DDIMScheduler's config; the latter has no variance.

    Raises ConversionError with the setting's name where this process does not support it.
    """
    _refuse_others(settings, _FIXED_SCHEDULER, source)
    betas = _read_betas(settings, source)
    section: dict[str, Any] = {"timesteps": len(betas), **_schedule_of(betas)}
    section["prediction"] = _ours(_PREDICTION_TYPE, "prediction_type", settings, "epsilon", source)
    if settings.get("_class_name", "DDPMScheduler") == "DDPMScheduler":
        section["variance"] = _ours(_VARIANCE_TYPE, "variance_type", settings, "fixed_small", source)
        if section["variance"] == "learned-range":
            section["loss"] = "hybrid"  # the loss by which such networks are trained
    return section


def _ours(names: Mapping[str, str], field: str, settings: Mapping[str, Any], default: str, source: str) -> str:
    theirs = settings.get(field, default)
    ours = {value: name for name, value in names.items()}
    if not isinstance(theirs, str) or theirs not in ours:
        raise ConversionError(f"{source}: {field} = {brief(theirs)}: should be one of {', '.join(ours)}")
    return ours[theirs]


def _refuse_others(settings: Mapping[str, Any], fixed: Mapping[str, tuple[Any, Any]], source: str) -> None:
    for field, (needed, default) in fixed.items():
        value = settings.get(field, default)
        if value != needed:
            found = f"{field} = {brief(value)}" if field in settings else f"{field} is left out, which means {value!r}"
            raise ConversionError(f"{source}: {found}: should be {needed!r}")


def _evenly(start: float, end: float, timesteps: int) -> Tensor:
    return torch.linspace(start, end, timesteps, dtype=torch.float64)


def _beta_settings(betas: Tensor) -> dict[str, Any]:
    """The name of a diffusers schedule with these betas, otherwise a table."""
    first, last = betas[0].item(), betas[-1].item()
    if _same(_evenly(first, last, len(betas)), betas):
        return {"beta_schedule": "linear", "beta_start": first, "beta_end": last, "trained_betas": None}
    if _same(cosine_betas(len(betas)), betas):
        return {"beta_schedule": "squaredcos_cap_v2", "trained_betas": None}
    return {"beta_schedule": "linear", "trained_betas": betas.tolist()}


def _read_betas(settings: Mapping[str, Any], source: str) -> Tensor:
    read = {field: settings.get(field, default) for field, default in _BETAS.items()}
    timesteps, start, end = (read[field] for field in ("num_train_timesteps", "beta_start", "beta_end"))
    if type(timesteps) is not int or not 1 < timesteps <= _MOST_TIMESTEPS:
        raise ConversionError(
            f"{source}: num_train_timesteps = {brief(timesteps)}: should be a whole number from 2 to {_MOST_TIMESTEPS}"
        )
    table = settings.get("trained_betas")
    for field, value in (("beta_start", start), ("beta_end", end)):
        if type(value) not in (int, float) or not 0 < value < 1:
            raise ConversionError(f"{source}: {field} = {brief(value)}: should be a number above 0 and below 1")
    try:
        if table is not None:
            betas = torch.tensor(table, dtype=torch.float64)
            if betas.ndim != 1 or not 1 < len(betas) <= _MOST_TIMESTEPS:
                raise ValueError(f"trained_betas should be a list of 2 to {_MOST_TIMESTEPS} numbers")
            return betas
        if read["beta_schedule"] == "linear":
            return _evenly(start, end, timesteps)
        if read["beta_schedule"] == "scaled_linear":
            return _evenly(start**0.5, end**0.5, timesteps) ** 2
        if read["beta_schedule"] == "squaredcos_cap_v2":
            return cosine_betas(timesteps)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConversionError(f"{source}: describes no betas ({error})") from error
    raise ConversionError(
        f"{source}: beta_schedule = {brief(read['beta_schedule'])}: should be linear, scaled_linear or "
        "squaredcos_cap_v2, or trained_betas should be given"
    )


def _schedule_of(betas: Tensor) -> dict[str, Any]:
    """The name of our schedule with these betas, otherwise the table."""
    for name in get_args(ScheduleName):
        if name != "table" and _same(make_betas(name, len(betas)), betas):
            return {"schedule": name}
    return {"schedule": "table", "betas": betas.tolist()}


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether betas are equal up to rounding to float32, in which diffusers stores them."""
    return ours.shape == theirs.shape and torch.allclose(ours.double(), theirs.double(), rtol=1e-6, atol=0)
