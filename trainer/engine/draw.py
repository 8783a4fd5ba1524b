"""Images from a run's checkpoint: single PNG files and a grid, over all processes."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from tqdm import tqdm

from trainer.engine.build import build_diffusion, build_network
from trainer.engine.checkpoints import Checkpoints, read_weights
from trainer.engine.processes import make_accelerator, together
from trainer.engine.run import RunFolder
from trainer.engine.sampling import sample, share_of
from trainer.errors import CheckpointError, ConfigError
from trainer.models.unet import UNet
from trainer.telemetry.pictures import Pixels, grid, save_png

_LARGEST_GRID = 64


@dataclass(frozen=True, kw_only=True)
class DrawRequest:
    """What to draw, from which weights, and where to put it."""

    run: Path
    count: int
    seed: int
    out: Path | None
    checkpoint: Path | None
    weights: Literal["ema", "model"]
    batch: int


def draw(request: DrawRequest) -> Path:
    """Write 000000.png, ... and grid.png (the first 64); returns their folder.

    Raises TrainerError where the run or the checkpoint cannot be used, or the folder cannot be written.
    """
    folder = RunFolder(request.run, writes=False)
    if not 0 <= request.seed < 2**63:
        raise ConfigError(f"--seed {request.seed}: should be at least 0 and below 2^63")
    config = folder.load_config()
    accelerator = make_accelerator(config.train.precision)
    checkpoints = Checkpoints(folder.checkpoints, accelerator)
    path = checkpoints.choose(request.checkpoint)
    network = build_network(config.model)
    step = together(f"{path}: cannot be read", lambda: _load_weights(network, request.weights, path))[0]
    network.eval().to(accelerator.device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stubs

    out = request.out or folder.samples / f"step-{step:08d}-{request.weights}-seed-{request.seed}"
    batches = share_of(request.count, request.batch, accelerator.process_index, accelerator.num_processes)
    with tqdm(
        total=config.diffusion.timesteps * sum(map(len, batches)),
        desc="sampling",
        unit="step",
        unit_scale=True,
        disable=None if accelerator.is_main_process else True,
    ) as bar:
        drawn = sample(
            network,
            config=config,
            diffusion=build_diffusion(config, accelerator.device),
            accelerator=accelerator,
            batches=batches,
            seed=request.seed,
            on_step=bar.update,
        )
        together(f"{out}: cannot be written", lambda: _write_images(out, drawn))
    if accelerator.is_main_process:
        _write_grid(out, min(request.count, _LARGEST_GRID))
        print(f"{request.count} images from {path} ({request.weights} weights, seed {request.seed}) in {out}")
    accelerator.end_training()
    return out


def _load_weights(network: UNet, kind: Literal["ema", "model"], path: Path) -> int:
    """Returns the checkpoint's step."""
    weights, manifest = read_weights(path, kind)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: its weights do not fit the network in the run's config.toml") from error
    return int(manifest["step"])


def _write_images(out: Path, drawn: Iterator[tuple[range, Pixels]]) -> None:
    for numbers, images in drawn:
        for number, image in zip(numbers, images, strict=True):
            save_png(out / f"{number:06d}.png", rearrange(image, "c h w -> h w c"))


def _write_grid(out: Path, count: int) -> None:
    images = []
    for number in range(count):
        with Image.open(out / f"{number:06d}.png") as image:
            images.append(np.atleast_3d(np.asarray(image)))
    save_png(out / "grid.png", grid(rearrange(np.stack(images), "n h w c -> n c h w")))
