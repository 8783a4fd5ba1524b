"""Regional torch.compile: the network's stages are compiled one by one, and stages of the same shape share their code.

Parameters and their names are unchanged, so checkpoints are independent of compilation.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
from torch import nn

from trainer.engine.processes.cpu_share import own_cores
from trainer.errors import ConfigError
from trainer.models.stages import stages

_MOST_SHAPES = 128  # variants of stages, in train and eval mode; the paper's 256 x 256 network needs 25 for each mode
_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "deterministic": True,  # no autotuning: after a restart it might choose kernels that round differently
    "fallback_random": True,  # the same dropout masks as in eager mode
    "triton.mix_order_reduction": False,  # silently computes wrong gradients of norms (pytorch issue 193061)
}


def compile_stages(network: nn.Module, cache: str | None, *, cuda_graphs: bool = False) -> None:
    """Compile every stage of the network in place when it first runs, once for each input shape.

    `cache`: folder for compiled code, see `use_cache`. `cuda_graphs`: replay a stage's kernels as one CUDA graph, which
    reuses the memory of its outputs and gradients. The caller then has to call
    `torch.compiler.cudagraph_mark_step_begin` before each forward pass and to accumulate gradients into tensors
    allocated before (`GuardedAdam`). Raises ConfigError where there is no compiler for the device. A stage that cannot
    be compiled without graph breaks is an error; it is never run in eager mode.
    """
    if cuda_graphs and not torch.cuda.is_available():
        raise ConfigError("train.cuda_graphs = true: no CUDA device is here; take false")
    if not torch.cuda.is_available() and not has_compiler():
        raise ConfigError('train.compile = "regional": no C++ compiler is here; install g++, set CXX, or take "none"')
    use_cache(cache)
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:  # otherwise inductor starts min(32, cores of the machine)
        torch._inductor.config.compile_threads = min(32, own_cores())
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_SHAPES)
    for stage in stages(network):
        # Its forward, not the module: hooks registered by a strategy on the module stay outside the compiled graph.
        stage.forward = torch.compile(  # type: ignore[method-assign]
            stage.forward, dynamic=False, fullgraph=True, options=_OPTIONS | {"triton.cudagraphs": cuda_graphs}
        )


def has_compiler() -> bool:
    """Whether a C++ compiler is installed, which inductor needs for CPUs."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None or shutil.which("clang++") is not None


def use_cache(folder: str | None) -> None:
    """Keep compiled code in this folder, shared by restarts and by other ranks.

    `folder` None: TORCHINDUCTOR_CACHE_DIR where that is set, else a folder in the user's home that survives a reboot.
    """
    if folder is None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or str(Path(base) / "ddpm-trainer" / "inductor")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder).absolute())
