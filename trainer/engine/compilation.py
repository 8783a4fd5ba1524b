"""The network's stages compiled by torch.compile, one by one ("regional"): stages alike share what is compiled once.

Parameters and their names stay as they are, so checkpoints do not tell whether their run was compiled.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config

from trainer.engine.cpu_share import own_cores
from trainer.errors import ConfigError
from trainer.models.unet import Stage, UNet

_MOST_SHAPES = 128  # of stages, in training and in evaluation mode; the paper's 256 x 256 network has 25 in each
_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "deterministic": True,  # no kernel chosen by timing it: a restart would round otherwise
    "fallback_random": True,  # dropout's masks are those of an uncompiled run
    "triton.mix_order_reduction": False,  # gave wrong gradients of norms, silently (pytorch issue 193061)
}


def compile_stages(network: UNet, cache: str | None, *, cuda_graphs: bool = False) -> None:
    """Have every stage of the network compiled when it first runs, in place; each shape of input on its own.

    `cache`: where compiled code is kept, see `use_cache`. `cuda_graphs`: replay a stage's kernels as one graph, which
    reuses the memory of its outputs and gradients. So `torch.compiler.cudagraph_mark_step_begin` has to be called
    before each forward pass, and gradients have to be added to tensors that were there before (`GuardedAdam`).
    Raises ConfigError where the device's code cannot be compiled. A stage that cannot be compiled as a whole is an
    error, never run uncompiled.
    """
    if cuda_graphs and not torch.cuda.is_available():
        raise ConfigError("train.cuda_graphs = true: no CUDA device is here; take false")
    if not torch.cuda.is_available() and not has_compiler():
        raise ConfigError('train.compile = "regional": no C++ compiler is here; install g++, set CXX, or take "none"')
    use_cache(cache)
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:  # else inductor starts 32, or as many as the machine has
        torch._inductor.config.compile_threads = min(32, own_cores())
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_SHAPES)
    for stage in network.modules():
        if isinstance(stage, Stage):
            # Its forward, not the module: what a strategy hooks to the module stays outside.
            stage.forward = torch.compile(  # type: ignore[method-assign]
                stage.forward, dynamic=False, fullgraph=True, options=_OPTIONS | {"triton.cudagraphs": cuda_graphs}
            )


def has_compiler() -> bool:
    """Whether a C++ compiler is here, which inductor needs to compile for CPUs."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None or shutil.which("clang++") is not None


def use_cache(folder: str | None) -> None:
    """Keep compiled code in this folder, for the restarts and for other ranks.

    Left out, it is TORCHINDUCTOR_CACHE_DIR where that is set, else a folder of the user's that survives a reboot.
    """
    if folder is None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or str(Path(base) / "ddpm-trainer" / "inductor")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder).absolute())
