"""The variational bound of real images in bits per dimension, and its rate-distortion curve.

Ho et al. 2020, section 4.3, table 1 (NLL), table 4 and figure 5.
"""

import csv
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from trainer.config.backbones import classes_of
from trainer.diffusion.ddpm.likelihood import BitsPerDim, Cdf, bits_per_dim, rate_distortion
from trainer.diffusion.ddpm.reverse import ReverseProcess
from trainer.drawing.trained import Trained, TrainedRequest, open_trained
from trainer.drawing.work import Task, Work
from trainer.engine.processes.collectives import each_its_own, together
from trainer.errors import ConfigError, DataError
from trainer.evaluation.images import RealImages, open_images
from trainer.evaluation.plots import save_curves
from trainer.sampling.request import ReverseRequest, batches_of

_QUANTITIES = ("prior", "bits", "x0_mse", "eps_mse")


@dataclass(frozen=True, kw_only=True)
class BoundRequest:
    """The network, its reverse process, and the images for which the bound is computed: `images` of `data` (None: the
    run's own), a random subset, or all (None).

    `held_out`: of the run's images only those excluded from training.
    """

    trained: TrainedRequest
    reverse: ReverseRequest
    data: Path | None
    held_out: bool
    images: int | None
    decoder: Cdf
    seed: int
    batch: int
    out: Path | None


def summary(bound: BitsPerDim) -> dict[str, float]:
    """Means over the images, the standard error of the total, and rate and distortion as in section 4.3."""
    rate = bound.prior + bound.bits[:, 1:].sum(dim=1)
    return {
        "bits_per_dim": bound.total.mean().item(),
        "standard_error": standard_error(bound.total),
        "prior_bits_per_dim": bound.prior.mean().item(),
        "rate_bits_per_dim": rate.mean().item(),
        "distortion_bits_per_dim": bound.bits[:, 0].mean().item(),
        "distortion_rmse_255": 127.5 * math.sqrt(bound.x0_mse[:, 0].mean().item()),
    }


def rows(bound: BitsPerDim, timesteps: list[int]) -> list[dict[str, float]]:
    """One row per timestep: L_t with its standard error and mean squared errors; and, given x_t, the rate so far
    (bits/dim) and the distortion (root mean squared error on 0..255).
    """
    received = rate_distortion(bound)
    return [
        {
            "t": t,
            "bits_per_dim": bound.bits[:, k].mean().item(),
            "standard_error": standard_error(bound.bits[:, k]),
            "x0_mse": bound.x0_mse[:, k].mean().item(),
            "eps_mse": bound.eps_mse[:, k].mean().item(),
            "rate_bits_per_dim": received.rate[:, -1 - k].mean().item(),
            "distortion_rmse_255": math.sqrt(received.mse[:, -1 - k].mean().item()),
        }
        for k, t in enumerate(timesteps)
    ]


def standard_error(values: torch.Tensor) -> float:
    """Standard error of the mean of independent values, (N,) with N >= 2."""
    return values.std().item() / math.sqrt(len(values))


def evaluate_bound(request: BoundRequest) -> Path:
    """Write bpd.json, terms.csv, curves.png and TensorBoard scalars; returns their folder.

    After a kill or a request to stop, the same request resumes. Raises TrainerError where the run, the checkpoint or
    the data cannot be used.
    """
    trained = open_trained(request.trained, request.reverse)
    if not isinstance(trained.denoiser, ReverseProcess):
        raise ConfigError(f"--run {request.trained.run}: its family has no bound that is a sum over timesteps")
    images = each_its_own(
        f"{request.data or trained.config.data.where}: cannot be read",
        lambda: open_images(
            trained.config,
            request.data,
            held_out=request.held_out,
            count=request.images,
            cond=["label"] if classes_of(trained.config.model) else [],
        ),
        kind=DataError,
    )
    out = request.out or trained.folder.path / "evaluation" / _name(trained, request, images)
    work = Work(out, _identity(trained, request, images), trained.accelerator)
    batches = batches_of(images.count, request.batch)
    if _measure(trained, request, images, work, batches):
        together(f"{out}: cannot be written", lambda: _report(trained, images, work, batches), only_rank=0)
    trained.accelerator.end_training()
    return out


def _measure(trained: Trained, request: BoundRequest, images: RealImages, work: Work, batches: list[range]) -> bool:
    """Compute what is missing, divided among the ranks, until a request to stop; returns whether all is there."""

    def measure(numbers: range, advance: Callable[[int], object]) -> None:
        cond = {name: tensor.to(trained.device) for name, tensor in images.cond(numbers).items()}
        reverse = trained.conditioned.given(cond)
        assert isinstance(reverse, ReverseProcess)
        with torch.no_grad():
            bound = bits_per_dim(
                reverse,
                images.load(numbers).to(trained.device),
                index=torch.tensor(images.ids(numbers), device=trained.device),
                seed=request.seed,
                cdf=request.decoder,
                on_step=lambda _: advance(len(numbers)),
            )
        work.save(numbers, {name: getattr(bound, name).cpu().numpy() for name in _QUANTITIES})

    task = Task(doing="bits/dim", items=images.count, units=trained.denoiser.diffusion.timesteps, unit="term")
    return work.carry_out(lambda: work.missing(batches), measure, task, trained.stop)


def _read(work: Work, batches: list[range]) -> BitsPerDim:
    """The results of all batches, concatenated in float64."""
    parts = [work.load(numbers) for numbers in batches]
    return BitsPerDim(
        **{name: torch.from_numpy(np.concatenate([part[name] for part in parts])).double() for name in _QUANTITIES}
    )


def _report(trained: Trained, images: RealImages, work: Work, batches: list[range]) -> None:
    bound = _read(work, batches)
    means, by_timestep = summary(bound), rows(bound, trained.denoiser.diffusion.original_timesteps.tolist())
    about = {"checkpoint": str(trained.checkpoint), "step": trained.step, "weights": trained.weights}
    content = {**about, "images": images.count, **means}
    (work.folder / "bpd.json").write_text(json.dumps(content, indent=1) + "\n")
    with (work.folder / "terms.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, by_timestep[0])
        writer.writeheader()
        writer.writerows(by_timestep)
    save_curves(work.folder / "curves.png", by_timestep, trained.timesteps)
    _to_tensorboard(work.folder, trained.step, means, by_timestep)
    print(
        f"{means['bits_per_dim']:.4f} +- {means['standard_error']:.4f} bits/dim over {images.count} images = "
        f"rate {means['rate_bits_per_dim']:.4f} (of it L_T {means['prior_bits_per_dim']:.2g}) + distortion "
        f"{means['distortion_bits_per_dim']:.4f} (RMSE {means['distortion_rmse_255']:.3f} of 255), in {work.folder}"
    )


def _to_tensorboard(folder: Path, step: int, means: dict[str, float], by_timestep: list[dict[str, float]]) -> None:
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as writer:
        for name, value in means.items():
            writer.add_scalar(f"likelihood/{name}", value, step)
        for row in by_timestep:
            for name in ("bits_per_dim", "rate_bits_per_dim", "distortion_rmse_255"):
                writer.add_scalar(f"by_timestep/{name}", row[name], int(row["t"]))


def _name(trained: Trained, request: BoundRequest, images: RealImages) -> str:
    data = [_data_name(trained, request), f"n-{images.count}"]
    parts = ["bpd", *trained.name_parts, *data, *request.reverse.name_parts]
    if request.decoder != "exact":
        parts.append(request.decoder)
    return "-".join([*parts, f"seed-{request.seed}"])


def _data_name(trained: Trained, request: BoundRequest) -> str:
    name = request.data.name if request.data is not None else Path(trained.config.data.path or "mixture").name
    return f"{name}-held-out" if request.held_out else name


def _identity(trained: Trained, request: BoundRequest, images: RealImages) -> dict[str, Any]:
    return {
        **trained.identity,
        "data": images.dataset.fingerprint,
        "held_out": request.held_out,
        "images": images.count,
        "respacing": request.reverse.respacing,
        "decoder": request.decoder,
        "seed": request.seed,
        "batch": request.batch,
    }
