"""Names of tensors in other implementations of the same UNet.

DIFFUSERS        diffusers.UNet2DModel, as written by `export`
DIFFUSERS_OLD    the same before diffusers 0.15, as in the published `google/ddpm-*`
AUTHORS          pesser/pytorch_diffusion: the authors' TensorFlow weights, converted

Layers and shapes correspond one to one, except in attention: its projections are dense layers here and in diffusers,
and 1 x 1 convolutions in AUTHORS.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from trainer.errors import ConversionError
from trainer.models.ddpm_unet import UNet
from trainer.models.layers import Downsample, Upsample


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Templates of another implementation's names.

    {level} counts resolutions from the finest, {rise} from the coarsest, {block} residual blocks within one. `layers`
    has the layers outside of blocks, `residual` and `attention` the parts of a block.
    """

    layers: Mapping[str, str]
    residual: Mapping[str, str]
    attention: Mapping[str, str]
    down: str
    down_attention: str
    downsample: str
    middle: tuple[str, str]
    middle_attention: str
    up: str
    up_attention: str
    upsample: str


DIFFUSERS = Layout(
    layers={
        "temb.dense_in": "time_embedding.linear_1",
        "temb.dense_out": "time_embedding.linear_2",
        "conv_in": "conv_in",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
    },
    residual={
        "norm_in": "norm1",
        "conv_in": "conv1",
        "dense_temb": "time_emb_proj",
        "norm_out": "norm2",
        "conv_out": "conv2",
        "shortcut": "conv_shortcut",
    },
    attention={"norm": "group_norm", "query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"},
    down="down_blocks.{level}.resnets.{block}",
    down_attention="down_blocks.{level}.attentions.{block}",
    downsample="down_blocks.{level}.downsamplers.0.conv",
    middle=("mid_block.resnets.0", "mid_block.resnets.1"),
    middle_attention="mid_block.attentions.0",
    up="up_blocks.{rise}.resnets.{block}",
    up_attention="up_blocks.{rise}.attentions.{block}",
    upsample="up_blocks.{rise}.upsamplers.0.conv",
)
DIFFUSERS_OLD = replace(
    DIFFUSERS,
    attention={"norm": "group_norm", "query": "query", "key": "key", "value": "value", "out": "proj_attn"},
)
AUTHORS = Layout(
    layers={
        **DIFFUSERS.layers,
        **{"temb.dense_in": "temb.dense.0", "temb.dense_out": "temb.dense.1", "norm_out": "norm_out"},
    },
    residual={**DIFFUSERS.residual, "dense_temb": "temb_proj", "shortcut": "nin_shortcut"},
    attention={"norm": "norm", "query": "q", "key": "k", "value": "v", "out": "proj_out"},
    down="down.{level}.block.{block}",
    down_attention="down.{level}.attn.{block}",
    downsample="down.{level}.downsample.conv",
    middle=("mid.block_1", "mid.block_2"),
    middle_attention="mid.attn_1",
    up="up.{level}.block.{block}",
    up_attention="up.{level}.attn.{block}",
    upsample="up.{level}.upsample.conv",
)


def names(network: UNet, layout: Layout) -> dict[str, str]:
    """Our name of every tensor -> the layout's, in the network's order."""
    return names_by_layer(network, dict(_modules(network, layout)))


def names_by_layer(network: nn.Module, layers: Mapping[str, str]) -> dict[str, str]:
    """Our name of every tensor -> another program's, in the network's order, from our and its name of every layer."""
    split = {name: name.rpartition(".") for name in network.state_dict()}
    return {name: f"{layers[layer]}.{kind}" for name, (layer, _, kind) in split.items()}


def to_layout(weights: Mapping[str, Tensor], network: UNet, layout: Layout) -> dict[str, Tensor]:
    """The network's state dict under the layout's names."""
    return {theirs: weights[ours] for ours, theirs in names(network, layout).items()}


def from_layout(tensors: Mapping[str, Tensor], network: UNet, layout: Layout, *, source: str) -> dict[str, Tensor]:
    """The network's state dict, float32, from tensors under the layout's names; errors as `fit`."""
    return fit(tensors, network, names(network, layout), source=source)


def fit(
    tensors: Mapping[str, Tensor], network: nn.Module, theirs_of: Mapping[str, str] | None = None, *, source: str
) -> dict[str, Tensor]:
    """The network's state dict, float32, from tensors named according to `theirs_of`: our name -> theirs (default:
    ours). The network itself may be on the device "meta".

    Raises ConversionError with the tensor's name where one is missing, unexpected, of another shape, not floating point
    or not finite; `source` is their origin, for messages.
    """
    expected = {name: value.shape for name, value in network.state_dict().items()}
    if theirs_of is None:
        theirs_of = {name: name for name in expected}
    if missing := [theirs for theirs in theirs_of.values() if theirs not in tensors]:
        raise ConversionError(f"{source}: {missing[0]}: missing ({len(missing)} of {len(theirs_of)} tensors are)")
    if left_over := sorted(tensors.keys() - set(theirs_of.values())):
        raise ConversionError(f"{source}: {left_over[0]}: of no layer of this network ({len(left_over)} such tensors)")
    return {
        ours: _checked(tensors[theirs], expected[ours], where=f"{source}: {theirs}")
        for ours, theirs in theirs_of.items()
    }


def _checked(tensor: Tensor, shape: torch.Size, *, where: str) -> Tensor:
    pointwise = tuple(tensor.shape[: len(shape)]) == tuple(shape) and set(tensor.shape[len(shape) :]) <= {1}
    if not pointwise:  # a dense layer may be stored as a 1 x 1 convolution, (C, C, 1, 1) or (C, C, 1)
        raise ConversionError(f"{where}: shape {tuple(tensor.shape)}, the network has {tuple(shape)}")
    if not tensor.is_floating_point():
        raise ConversionError(f"{where}: {tensor.dtype}, weights are floating point numbers")
    kept = tensor.reshape(shape).float().contiguous()
    if not bool(kept.isfinite().all()):  # after conversion: float64 values may overflow float32
        raise ConversionError(f"{where}: holds NaN or infinity, as float32")
    return kept


def _modules(network: UNet, layout: Layout) -> Iterator[tuple[str, str]]:
    """Our name and the layout's of every layer that may have weights; a block may lack shortcut and attention."""
    yield from layout.layers.items()
    for number, residual in enumerate(layout.middle):
        yield from _stage(f"middle.{number}", layout, residual, layout.middle_attention)
    last = len(network.config.channel_multipliers) - 1
    for path, residual, attention, resampling in (
        ("down", layout.down, layout.down_attention, layout.downsample),
        ("up", layout.up, layout.up_attention, layout.upsample),
    ):
        steps = block = 0  # resampling layers so far, blocks since the last one
        for number, layer in enumerate(getattr(network, path)):
            level = steps if path == "down" else last - steps
            here = {"level": level, "rise": last - level, "block": block}
            if isinstance(layer, Downsample | Upsample):
                yield f"{path}.{number}.conv", resampling.format(**here)
                steps, block = steps + 1, 0
            else:
                yield from _stage(f"{path}.{number}", layout, residual.format(**here), attention.format(**here))
                block += 1


def _stage(ours: str, layout: Layout, residual: str, attention: str) -> Iterator[tuple[str, str]]:
    for part, theirs in layout.residual.items():
        yield f"{ours}.residual.{part}", f"{residual}.{theirs}"
    for part, theirs in layout.attention.items():
        yield f"{ours}.attention.{part}", f"{attention}.{theirs}"
