"""What the tests of whole runs share: a small dataset, a small configuration, launching, comparing."""

import importlib
import json
import multiprocessing
import multiprocessing.context
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_prep.cli import main as data_prep
from tests.faults import Fault
from trainer.config import Config, DDPMUNetConfig
from trainer.engine.checkpointing.checkpoints import open_verified
from trainer.launcher import parent as launcher

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG = """
run_dir = "RUN_DIR"
seed = 3
[data]
path = "DATA"
flip = true
workers = 1
[model]
image_size = 8
base_channels = 8
channel_multipliers = [1, 2]
blocks_per_level = 1
attention_resolutions = [4]
dropout = 0.1
norm_groups = 4
[diffusion]
timesteps = 20
variance = "small"
[optimizer]
learning_rate = 1e-3
warmup = "2 steps"
[train]
duration = "6 steps"
global_batch = 8
ema_decay = 0.9
[checkpoint]
every = "2 steps"
keep = 10
[log]
every = "1 steps"
samples_every = "0 steps"
samples = 4
"""


def unet_section(**changes: Any) -> DDPMUNetConfig:
    """The paper's CIFAR-10 network, without dropout, but for `changes`."""
    levels = {"channel_multipliers": [1, 2, 2, 2], "attention_resolutions": [16]}
    return DDPMUNetConfig.model_validate({"image_size": 32, "base_channels": 128, **levels, **changes})


def make_dataset(folder: Path, *, images: int = 21, shard_samples: int = 10, classes: int | None = None) -> Path:
    """8 x 8 colour images, each of its own; by default three shards of 10, 10 and 1. With classes, image n is of the
    class n modulo classes.
    """
    source = folder / "images"
    source.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(images):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        of_class = source if classes is None else source / f"class-{number % classes}"
        of_class.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(of_class / f"{number:03d}.png")
    arguments = [str(source), str(folder / "shards"), "--size", "8", "--workers", "1"]
    assert data_prep([*arguments, "--shard-samples", str(shard_samples)]) == 0
    return folder / "shards"


def write_config(folder: Path, data: Path, name: str = "run") -> Path:
    """A configuration file for a run in `folder`/`name`."""
    path = folder / f"{name}.toml"
    path.write_text(CONFIG.replace("RUN_DIR", str(folder / name)).replace("DATA", str(data)))
    return path


def load_config(path: Path, *overrides: str) -> Config:
    return Config.load(path, overrides)


def environment(**extra: str) -> dict[str, str]:
    """This process's environment, with the repository importable and nothing of a launcher left in it."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "TORCHELASTIC_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        clean.pop(name, None)
    return {**clean, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **extra}


def launch(
    processes: int,
    *arguments: str,
    expect: int | list[int] | None = 0,
    script: str = "train",
    fault: Fault | None = None,
    path: Path | None = None,
    family: str | None = None,
) -> str:
    """Run trainer/train.py (or sample.py, evaluate.py, convert.py) in `processes` processes, as torchrun would.

    script: the name of a file of trainer/, or a module with a `main`, such as "tests.stream_ranks".

    They are forked from a server that has imported everything, which saves seconds; the real launchers have tests of
    their own. `expect` is the exit code of every process, or of each (none waits for one that is to end by SIGKILL);
    None where a fault kills one of them, and the others are killed in their turn, as launchers do. path: a folder from
    which they can import too. family: a module whose `register` is called first. Returns what all of them printed.
    """
    context = server()
    port = free_port()
    with tempfile.NamedTemporaryFile("r+") as log:
        ranks = [
            context.Process(
                target=run_rank, args=(rank, processes, port, script, arguments, fault, log.name, path, family)
            )
            for rank in range(processes)
        ]
        for process in ranks:
            process.start()
        expected = expect if isinstance(expect, list) else [expect] * processes
        awaited = [process for process, code in zip(ranks, expected) if code != -signal.SIGKILL]
        patience = 2.0 if expect is None else 30.0  # for the others, when one has failed
        deadline = time.monotonic() + 240
        while any(process.is_alive() for process in awaited) and time.monotonic() < deadline:
            if any(process.exitcode for process in ranks):
                deadline = min(deadline, time.monotonic() + patience)
            time.sleep(0.02)
        stuck = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        for process in ranks:
            process.kill()
            process.join()
        output = log.read()
    codes = [process.exitcode for process in ranks]
    if expect is None:
        assert any(codes), output
    else:
        assert codes == expected, f"exit codes {codes}, stuck ranks {stuck}\n{output}"
    return output


def server() -> multiprocessing.context.ForkServerContext:
    """Forks processes from one that has imported everything that ranks need, which saves seconds for each."""
    os.environ["PYTHONPATH"] = str(REPOSITORY)  # the server inherits it
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            *("tests.harness", "trainer.train", "trainer.sample", "trainer.evaluate", "trainer.convert"),
            *("trainer.engine.strategies.zero", "trainer.engine.strategies.fsdp"),
            # What optimizers and DeepSpeed import when they are first used: seconds for every process.
            *("torch._dynamo", "torch._inductor", "deepspeed.runtime.zero.muon.muon_optimizer"),
            "tests.preloaded",  # the last: it freezes what the others have made
        ]
    )
    return context


def run_rank(
    rank: int,
    processes: int,
    port: int,
    script: str,
    arguments: tuple[str, ...],
    fault: Fault | None,
    log: str,
    path: Path | None = None,
    family: str | None = None,
) -> None:
    """Be one rank of `launch`, in a process of its own: never returns."""
    os.environ.update(environment(), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if processes > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        os.environ.update(WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.chdir(REPOSITORY)
    if path is not None:
        sys.path.insert(0, str(path))
    launcher._parent = os.getppid()  # it was imported by the server, whose parent is another
    if family is not None:
        importlib.import_module(family).register()
    if fault is not None and fault.rank == rank:
        fault.inject()
    sys.argv = [f"{script}.py", *arguments]
    sys.exit(importlib.import_module(script if "." in script else f"trainer.{script}").main())


def overrides(**values: Any) -> list[str]:
    """`--set` arguments: overrides(train__duration="4 steps") is --set train.duration=4 steps."""
    pairs = [f"{name.replace('__', '.')}={value}" for name, value in values.items()]
    return [argument for pair in pairs for argument in ("--set", pair)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def read_verified(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors, whole, and the manifest of a checkpoint."""
    reader, manifest = open_verified(path)
    return {name: reader.whole(name) for name in reader.shapes}, manifest


def tensors_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    return read_verified(checkpoint(run, step))[0]


def assert_same_state(one: Path, other: Path, step: int) -> None:
    """Weights, EMA and optimizer are the same to the last bit, and so is the rest of the state."""
    (tensors, manifest), (others, other_manifest) = (read_verified(checkpoint(run, step)) for run in (one, other))
    assert tensors.keys() == others.keys()
    different = [name for name in tensors if not torch.equal(tensors[name], others[name])]
    assert not different
    assert manifest["state"] == other_manifest["state"]


def largest_difference(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def logged(run: Path, name: str = "train/loss") -> dict[int, float]:
    """A logged scalar by step; no step may be there twice."""
    records = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert len({record["step"] for record in records}) == len(records)
    return {record["step"]: record[name] for record in records if name in record}


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
