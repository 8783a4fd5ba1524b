"""Stages: the parts of a network that the engine compiles, shards and checkpoints one by one."""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

ActivationCheckpointing = Literal["none", "selective", "full"]
_TAKE_TIME = {
    torch.ops.aten.convolution.default,
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def _keep_what_takes_time(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _TAKE_TIME else CheckpointPolicy.PREFER_RECOMPUTE


class Stage(nn.Module):
    """A part of a network whose activations can be computed again in the backward pass; a subclass has `compute`.

    `activation_checkpointing`, while training: "full" recomputes all of the stage, "selective" all but the outputs of
    convolutions, dense layers and attention, which take nearly all the time. The gradients stay the same, dropout
    included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.activation_checkpointing: ActivationCheckpointing = "none"

    def compute(self, *inputs: Tensor) -> Tensor:
        """The output of the stage."""
        raise NotImplementedError

    def forward(self, *inputs: Tensor) -> Tensor:
        """`compute`, with activation checkpointing."""
        if self.activation_checkpointing == "none" or not self.training:
            return self.compute(*inputs)
        if self.activation_checkpointing == "full":
            return checkpoint(self.compute, *inputs, use_reentrant=False)
        contexts = partial(create_selective_checkpoint_contexts, _keep_what_takes_time)
        return checkpoint(self.compute, *inputs, use_reentrant=False, context_fn=contexts)


def checkpoint_activations(network: nn.Module, kind: ActivationCheckpointing) -> None:
    """Set the activation checkpointing of all stages."""
    for stage in stages(network):
        stage.activation_checkpointing = kind


def stages(network: nn.Module) -> list[Stage]:
    """The stages of a network, which may be wrapped, in the order of its modules."""
    return [module for module in network.modules() if isinstance(module, Stage)]
