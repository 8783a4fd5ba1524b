"""The weights that OpenAI published with ADM (guided-diffusion): flat state dicts of UNets, upsamplers and classifiers.

They do not say what is in no shape (heads, order of attention, side of the images), so the network's configuration has
to be given with them.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from trainer.interop.layouts import fit, names_by_layer
from trainer.models.adm_classifier import AdaptivePool, ADMClassifier, AttentionPool, SpatialPool
from trainer.models.adm_layers import Downsample, ResidualBlock, SelfAttention, Upsample
from trainer.models.adm_unet import ADMStage, ADMUNet

FIRST = "input_blocks.0.0.weight"  # of every such state dict
_OUTER = {
    "temb.dense_in": "time_embed.0",
    "temb.dense_out": "time_embed.2",
    "label_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "norm_out": "out.0",
    "conv_out": "out.2",
}
_PARTS: dict[type[nn.Module], dict[str, str]] = {
    ResidualBlock: {
        "norm_in": "in_layers.0",
        "conv_in": "in_layers.2",
        "dense_temb": "emb_layers.1",
        "norm_out": "out_layers.0",
        "conv_out": "out_layers.3",
        "shortcut": "skip_connection",
    },
    SelfAttention: {"norm": "norm", "qkv": "qkv", "out": "proj_out"},
    Downsample: {"conv": "op"},
    Upsample: {"conv": "conv"},
}
_POOLS: dict[type[nn.Module], dict[str, str]] = {
    AttentionPool: {"pool": "out.2", "pool.norm": "out.0", "pool.qkv": "out.2.qkv_proj", "pool.out": "out.2.c_proj"},
    AdaptivePool: {"pool.norm": "out.0", "pool.out": "out.3"},
    SpatialPool: {"pool.hidden": "out.0", "pool.out": "out.2"},
}
# Dense layers here, convolutions of one dimension (C', C, 1) or two (C', C, 1, 1) there.
_POINTWISE = {"qkv": 3, "proj_out": 3, "qkv_proj": 3, "c_proj": 3, "out.3": 4}


def names(network: ADMUNet | ADMClassifier) -> dict[str, str]:
    """Our name of every tensor -> OpenAI's."""
    layers = {**_OUTER, **dict(_stages(network))}
    if isinstance(network, ADMClassifier):
        layers |= _POOLS[type(network.pool)]
    return names_by_layer(network, layers)


def to_openai(weights: Mapping[str, Tensor], network: ADMUNet | ADMClassifier) -> dict[str, Tensor]:
    """The network's state dict in OpenAI's names and shapes. The network itself may be on the device "meta"."""
    return {theirs: _published(theirs, weights[ours]) for ours, theirs in names(network).items()}


def from_openai(tensors: Mapping[str, Tensor], network: ADMUNet | ADMClassifier, *, source: str) -> dict[str, Tensor]:
    """The network's state dict, float32, from OpenAI's; errors as `fit`."""
    return fit(tensors, network, names(network), source=source)


def _stages(network: ADMUNet | ADMClassifier) -> Iterator[tuple[str, str]]:
    """Our name and OpenAI's of every layer in a stage."""
    blocks = {f"down.{n}": f"input_blocks.{n + 1}" for n in range(len(network.down))} | {"middle": "middle_block"}
    if isinstance(network, ADMUNet):
        blocks |= {f"up.{n}": f"output_blocks.{n}" for n in range(len(network.up))}
    for ours, block in blocks.items():
        stage = network.get_submodule(ours)
        assert isinstance(stage, ADMStage)
        for place, part in enumerate(stage.parts):
            for layer, theirs in _PARTS[type(part)].items():
                yield f"{ours}.parts.{place}.{layer}", f"{block}.{place}.{theirs}"


def _published(name: str, tensor: Tensor) -> Tensor:
    layer, _, kind = name.rpartition(".")
    dimensions = next((n for end, n in _POINTWISE.items() if layer == end or layer.endswith(f".{end}")), 0)
    if kind != "weight" or not dimensions:
        return tensor
    return tensor.reshape(*tensor.shape, *[1] * (dimensions - tensor.ndim))
