"""Weights as others publish them: diffusers' old and new names, the authors' names, settings beside them."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.harness import unet_section
from tests.networks import reference
from trainer.config import DDPMUNetConfig

SMALL = unet_section(
    image_size=8,
    base_channels=8,
    channel_multipliers=[1, 2],
    blocks_per_level=1,
    attention_resolutions=[4],
    norm_groups=4,
)

OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
# As published, fields of later versions left out.
PUBLISHED_UNET = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "center_input_sample": False,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "time_embedding_type": "positional",
}
PUBLISHED_SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.1.1",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "variance_type": "fixed_large",
}


def is_attention_weight(name: str) -> bool:
    return any(f".{part}." in name for part in OLD_NAMES) and name.endswith("weight")


def old_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    pattern = re.compile("|".join(map(re.escape, OLD_NAMES)))
    return {pattern.sub(lambda match: OLD_NAMES[match[0]], name): value for name, value in tensors.items()}


def as_convolutions(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: v[:, :, None, None] if is_attention_weight(name) else v for name, v in tensors.items()}


def authors_names(tensors: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """diffusers' names to pytorch_diffusion's, where `up` counts from the finest level."""
    renamed = {}
    for name, value in as_convolutions(tensors).items():
        name = re.sub(r"^up_blocks\.(\d)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
        name = re.sub(r"^mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
        for pattern, theirs in (
            (r"^down_blocks", "down"),
            (r"^mid_block\.attentions\.0", "mid.attn_1"),
            (r"\.resnets\.", ".block."),
            (r"\.attentions\.", ".attn."),
            (r"(down|up)samplers\.0", r"\1sample"),
            (r"time_embedding\.linear_1", "temb.dense.0"),
            (r"time_embedding\.linear_2", "temb.dense.1"),
            (r"time_emb_proj", "temb_proj"),
            (r"conv_shortcut", "nin_shortcut"),
            (r"conv_norm_out", "norm_out"),
            (r"group_norm", "norm"),
            (r"to_out\.0", "proj_out"),
            (r"\.to_([qkv])\.", r".\1."),
        ):
            name = re.sub(pattern, theirs, name)
        renamed[name] = value
    return renamed


def publish(folder: Path, network: DDPMUNetConfig, tensors: dict[str, Tensor], **changes: Any) -> Path:
    """A folder like google/ddpm-*: everything in one place, weights in a pickle."""
    folder.mkdir(parents=True)
    with torch.device("meta"):
        theirs = reference(network).config
    settings = PUBLISHED_UNET | {
        "sample_size": network.image_size,
        "norm_num_groups": network.norm_groups,
        "layers_per_block": network.blocks_per_level,
        **{name: list(theirs[name]) for name in ("block_out_channels", "down_block_types", "up_block_types")},
    }
    (folder / "config.json").write_text(json.dumps(settings | changes))
    (folder / "scheduler_config.json").write_text(json.dumps(PUBLISHED_SCHEDULER))
    torch.save(tensors, folder / "diffusion_pytorch_model.bin")
    return folder
