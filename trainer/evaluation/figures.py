"""The figures of Ho et al. 2020 for a trained network, and DDIM's reconstructions; each a picture and a JSON.

The processes divide the rows of a figure; the same seed gives the same figure on any number of them.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from einops import rearrange

from data_prep.progress import WorkProgress
from trainer.data.images import Pixels, to_uint8
from trainer.diffusion.contract import SamplingStep
from trainer.diffusion.keyed_noise import KeyedNoise
from trainer.drawing.trained import Trained
from trainer.engine.processes.collectives import together
from trainer.engine.processes.division import map_over_ranks
from trainer.errors import ConfigError
from trainer.evaluation.figure_files import FigureFile
from trainer.sampling.ancestral import ancestral
from trainer.sampling.ddim import ddim, ddim_invert
from trainer.sampling.interpolation import interpolate
from trainer.sampling.request import ReverseRequest
from trainer.sampling.steps import last_of
from trainer.telemetry.pictures import tile

OnStep = Callable[[SamplingStep], object]
Row = tuple[torch.Tensor, dict[str, Any]]  # (columns, C, H, W) in [-1, 1], and the JSON's entry for it


@dataclass(frozen=True, kw_only=True)
class FigureRequest:
    """Reverse process, number of rows, seed, and path of the picture (None: in the run's folder)."""

    reverse: ReverseRequest
    rows: int
    seed: int
    out: Path | None


@dataclass(frozen=True, kw_only=True)
class FigureImages:
    """Real images, (N, C, H, W) in [-1, 1], and their origin, for the figure's JSON."""

    pixels: torch.Tensor
    source: dict[str, Any]


def progressive_generation(trained: Trained, request: FigureRequest, *, every: int | None) -> Path:
    """Figure 6: estimates of x_0, one every `every` steps of the reverse process (None: 20 of them); a row is a
    sample.
    """
    diffusion = trained.denoiser.diffusion
    every = every or max(1, diffusion.timesteps // 20)

    def row(number: int, on_step: OnStep) -> Row:
        noise = KeyedNoise.sampling(request.seed, torch.tensor([number], device=trained.device))
        x = noise.normal("initial", trained.config.model.image_shape)
        estimates, timesteps = [], []
        denoiser = trained.denoiser_of([number], seed=request.seed)
        for done, state in enumerate(ancestral(denoiser, x, noise=noise), start=1):
            on_step(state)
            if done % every == 0 or done in (1, diffusion.timesteps):
                estimates.append(state.x0.clamp(-1, 1))
                timesteps.append(state.original_t)
        return torch.cat(estimates), {"sample": number, "estimated_at_t": timesteps}

    return _draw(trained, request, "progressive", row, steps=diffusion.timesteps, options={"every": every})


def shared_latents(trained: Trained, request: FigureRequest, *, splits: Sequence[int] | None, variants: int) -> Path:
    """Figure 7: samples that share x_t and are denoised independently from there, t in `splits` (None: all steps of the
    process, 3/4, 1/2 and 1/4 of them; the paper's 1000, 750, 500, 250).

    A row has x_0 of one latent: for each split, `variants` samples.
    """
    diffusion = trained.denoiser.diffusion
    splits = splits or sorted({max(1, diffusion.timesteps * quarters // 4) for quarters in (1, 2, 3, 4)}, reverse=True)
    for split in splits:
        if not 0 < split <= diffusion.timesteps:
            raise ConfigError(f"--splits {split}: should be 1 to {diffusion.timesteps}, the steps of the process")

    def row(number: int, on_step: OnStep) -> Row:
        noise = KeyedNoise.sampling(request.seed, torch.tensor([number], device=trained.device))
        x = noise.normal("initial", trained.config.model.image_shape)
        shared = {diffusion.timesteps: x}
        for state in ancestral(trained.denoiser_of([number], seed=request.seed), x, noise=noise):
            on_step(state)
            if state.t in splits:
                shared[state.t] = state.x
            if state.t <= min(splits):
                break
        # Each with an index of its own, hence with noise independent of the shared steps and of other rows.
        numbers = request.rows + number * variants + torch.arange(variants, device=trained.device)
        others = KeyedNoise.sampling(request.seed, numbers)
        denoiser = trained.denoiser_of([number] * variants, seed=request.seed)  # of one class
        images = []
        for split in sorted(splits, reverse=True):
            x = shared[split].expand(variants, -1, -1, -1)
            images.append(last_of(ancestral(denoiser, x, noise=others, start=split - 1), on_step))
        return torch.cat(images), {"latent": number, "splits": sorted(splits, reverse=True), "variants": variants}

    steps = diffusion.timesteps - min(splits) + sum(splits)
    options = {"splits": sorted(splits, reverse=True), "variants": variants}
    return _draw(trained, request, "shared-latents", row, steps=steps, options=options)


def interpolations(
    trained: Trained,
    request: FigureRequest,
    *,
    images: FigureImages,
    timesteps: Sequence[int] | None,
    lambdas: Sequence[float],
) -> Path:
    """Figures 8 and 9: two images diffused for t steps with the same noise, interpolated and denoised; t = 0
    interpolates pixels.

    images: in pairs. A row is a pair at one t (None: half of the steps; the paper: 500; or 1000, 875, ..., 0): the
    first image, interpolations by `lambdas` (0.1 to 0.9), the second. Raises ConfigError for an odd number of images.
    """
    if len(images.pixels) % 2:
        raise ConfigError(f"interpolate: takes images in pairs, got {len(images.pixels)}")
    diffusion = trained.denoiser.diffusion
    timesteps = timesteps or [diffusion.timesteps // 2]
    for t in timesteps:
        if not 0 <= t <= diffusion.timesteps:
            raise ConfigError(f"--timesteps {t}: should be 0 to {diffusion.timesteps}, the steps of the process")

    def row(number: int, on_step: OnStep) -> Row:
        pair, t = divmod(number, len(timesteps))
        one, other = (image[None] for image in images.pixels[2 * pair : 2 * pair + 2].to(trained.device))
        mixtures = interpolate(
            trained.denoiser_of([pair] * len(lambdas), seed=request.seed),
            one,
            other,
            t=timesteps[t],
            lambdas=lambdas,
            noise=KeyedNoise.sampling(request.seed, torch.tensor([pair], device=trained.device)),
            on_step=on_step,
        )
        notes = {"pair": pair, "t": timesteps[t], "lambdas": list(lambdas)}
        return torch.cat((one, mixtures[:, 0], other)), notes

    return _draw(
        trained,
        replace(request, rows=len(images.pixels) // 2 * len(timesteps)),
        f"interpolation-t-{'-'.join(map(str, timesteps))}",
        row,
        steps=sum(timesteps) // len(timesteps),
        options={"timesteps": list(timesteps), "lambdas": list(lambdas)},
        images=images,
    )


def reconstructions(trained: Trained, request: FigureRequest, *, images: FigureImages) -> Path:
    """DDIM, section 5.4: an image, its latent x_T by the reversed deterministic process, and the image decoded from
    x_T.
    """
    diffusion = trained.denoiser.diffusion

    def row(number: int, on_step: OnStep) -> Row:
        noise = KeyedNoise.sampling(request.seed, torch.tensor([number], device=trained.device))
        image = images.pixels[number : number + 1].to(trained.device)
        denoiser = trained.denoiser_of([number], seed=request.seed)
        latent = last_of(ddim_invert(denoiser, image), on_step)
        x = last_of(ddim(denoiser, latent, noise=noise, clip=False), on_step)
        error = (x - image).square().mean().item()
        return torch.cat((image, (latent / 3).clamp(-1, 1), x.clamp(-1, 1))), {"image": number, "mse": error}

    rows = replace(request, rows=len(images.pixels))
    return _draw(trained, rows, "reconstruction", row, steps=2 * diffusion.timesteps, images=images)


def _made_by(request: FigureRequest, options: Mapping[str, Any], images: FigureImages | None) -> dict[str, Any]:
    about: dict[str, Any] = {"seed": request.seed, **options}
    if images is not None:
        pixels = images.pixels.cpu().contiguous().numpy().tobytes()
        about |= {**images.source, "pixels_sha256": hashlib.sha256(pixels).hexdigest()}
    else:
        about["number_of_rows"] = request.rows
    return about


def _draw(
    trained: Trained,
    request: FigureRequest,
    name: str,
    row: Callable[[int, OnStep], Row],
    *,
    steps: int,
    options: Mapping[str, Any] = MappingProxyType({}),
    images: FigureImages | None = None,
) -> Path:
    """Compute all rows, divided among the ranks, and write picture and JSON on rank 0. Returns the picture's path.

    Raises ConfigError where a different figure exists at that path.
    """
    accelerator = trained.accelerator
    file = FigureFile(trained, request.reverse, name=name, made_by=_made_by(request, options, images), out=request.out)
    path = file.path
    together(f"{path}: cannot be read", file.check, kind=ConfigError, only_rank=0)
    share = range(request.rows)[accelerator.process_index :: accelerator.num_processes]
    bar = WorkProgress(total=steps * len(share), what=name, unit="step", visible=accelerator.is_main_process)

    def on_step(_: SamplingStep) -> None:
        trained.stop.check()
        bar.update()

    @torch.no_grad()
    def make(number: int) -> tuple[Pixels, dict[str, Any]]:
        images, notes = row(number, on_step)
        return to_uint8(images).cpu().numpy(), notes

    with bar:
        made, _ = map_over_ranks(range(request.rows), make, what=f"{path}: cannot be drawn", stop=trained.stop)
    if len(made) < request.rows:
        if accelerator.is_main_process:
            print(f"stopped: {len(made)} of {request.rows} rows were drawn; {path} is made in one go, give it again")
        accelerator.end_training()
        return path

    def write() -> None:
        columns = made[0][0].shape[0]
        drawn = rearrange(np.stack([images for images, _ in made]), "r k c h w -> (r k) c h w")
        file.write(tile(drawn, columns=columns), rows=[notes for _, notes in made])
        print(f"{len(made)} rows in {path}")

    together(f"{path}: cannot be written", write, only_rank=0)
    accelerator.end_training()
    return path
