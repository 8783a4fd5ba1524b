"""Exports a run's weights: of a "ddpm-unet" as a folder that diffusers.DDPMPipeline and DDIMPipeline load, of an
"adm-unet" or "adm-classifier" as the state dict that guided-diffusion loads.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from trainer.config import ADMClassifierConfig, ADMUNetConfig, Config
from trainer.engine.checkpointing.checkpoints import Checkpoints, read_weights
from trainer.engine.processes.collectives import make_accelerator
from trainer.engine.run_folder import RunFolder
from trainer.errors import ConversionError
from trainer.inspection.text import size
from trainer.interop.diffusers_settings import scheduler_settings, unet_settings
from trainer.interop.hub import check_name, push
from trainer.interop.layouts import DIFFUSERS, fit, to_layout
from trainer.interop.model_card import model_card
from trainer.interop.openai import to_openai
from trainer.interop.staging import new_folder
from trainer.interop.supported import adm_network, ddpm_sections, network_of

GRID_NAME = "samples.png"
OPENAI_NAME = "model.pt"
_GRID_OF_STEP = re.compile(r"step-(\d{8,})\.png")
_MODEL_INDEX = {
    "_class_name": "DDPMPipeline",
    "scheduler": ["diffusers", "DDPMScheduler"],
    "unet": ["diffusers", "UNet2DModel"],
}


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """Run, weights and output folder; `command`, `license` and `grid` are for the model card.

    grid: a picture of samples, None for the newest one drawn in training with these weights; hub: name of a repository,
    or None.
    """

    run: Path
    checkpoint: Path | None
    weights: str
    out: Path
    license: str | None
    grid: Path | None
    hub: str | None
    command: str


def export(request: ExportRequest) -> None:
    """Write the folder, print a summary, and upload if requested.

    For diffusers it has model_index.json, unet/, scheduler/, README.md and samples.png, for guided-diffusion model.pt
    and config.toml, by which model.pt can be imported again. Raises TrainerError where run or checkpoint cannot be
    used, neither program has an equivalent network, `out` exists, an option does not apply, or the upload fails.
    """
    if request.hub is not None:
        check_name(request.hub)
    run = RunFolder(request.run, writes=False)
    config = run.load_config()
    if isinstance(config.model, ADMUNetConfig | ADMClassifierConfig):
        _export_to_openai(request, run, config)
        return
    model, diffusion = ddpm_sections(config)
    network = network_of(model, diffusion.variance)
    settings, scheduler = unet_settings(network), scheduler_settings(diffusion)
    with new_folder(request.out) as folder:
        checkpoint = Checkpoints(run.checkpoints, make_accelerator()).choose(request.checkpoint)
        saved, manifest = read_weights(checkpoint, request.weights)
        weights = fit(saved, network, source=str(checkpoint))
        (folder / "unet").mkdir()
        (folder / "scheduler").mkdir()
        save_file(
            to_layout(weights, network, DIFFUSERS),
            folder / "unet" / "diffusion_pytorch_model.safetensors",
            metadata={"format": "pt"},
        )
        _write_json(folder / "unet" / "config.json", settings)
        _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        _write_json(folder / "model_index.json", _MODEL_INDEX)
        grid = request.grid or _newest_grid(run, request.weights, manifest["step"])
        if grid is not None:
            _copy_picture(grid, folder / GRID_NAME)
        card = model_card(
            config,
            diffusion,
            manifest,
            checkpoint=checkpoint.name,
            weights=request.weights,
            parameters=sum(tensor.numel() for tensor in weights.values()),
            license_name=request.license,
            grid=GRID_NAME if grid is not None else None,
            command=request.command,
        )
        (folder / "README.md").write_text(card)
    print(_summary(request, checkpoint, manifest, weights, grid))
    if request.hub is not None:
        message = f"{request.weights} weights of step {manifest['step']}"
        print(f"uploaded to {push(request.out, request.hub, message=message)}")


def _export_to_openai(request: ExportRequest, run: RunFolder, config: Config) -> None:
    for option, value in (("--license", request.license), ("--grid", request.grid), ("--push-to-hub", request.hub)):
        if value is not None:
            raise ConversionError(f'{option} {value}: is for the model card of a "ddpm-unet", ADM has none')
    network = adm_network(config, str(request.run))
    with new_folder(request.out) as folder:
        checkpoint = Checkpoints(run.checkpoints, make_accelerator()).choose(request.checkpoint)
        saved, manifest = read_weights(checkpoint, request.weights)
        weights = fit(saved, network, source=str(checkpoint))
        torch.save(to_openai(weights, network), folder / OPENAI_NAME)
        (folder / "config.toml").write_text(config.to_toml())
    print(
        f"exported {request.weights} of {checkpoint}, step {manifest['step']:,}, to {request.out / OPENAI_NAME}, as "
        f"guided-diffusion loads it; its settings are in {request.out / 'config.toml'}"
    )


def _newest_grid(run: RunFolder, weights: str, step: int) -> Path | None:
    """The newest grid not later than that step; only the averaged weights have grids."""
    if weights != "ema":
        return None
    grids = {int(match[1]): path for path in run.samples.glob("*.png") if (match := _GRID_OF_STEP.fullmatch(path.name))}
    return max(((at, path) for at, path in grids.items() if at <= step), default=(0, None))[1]


def _copy_picture(path: Path, target: Path) -> None:
    try:
        with Image.open(path) as image:
            image.convert("L" if image.mode == "L" else "RGB").save(target)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConversionError(f"{path}: not an image that can be read ({error})") from error


def _summary(
    request: ExportRequest, checkpoint: Path, manifest: dict[str, Any], weights: Mapping[str, Tensor], grid: Path | None
) -> str:
    """Summary: source, files with their content, and how to use them."""
    files = sorted(path for path in request.out.rglob("*") if path.is_file())
    parameters = sum(tensor.numel() for tensor in weights.values())
    rows = {
        "weights": f"{request.weights} of {checkpoint}, step {manifest['step']:,}, {parameters:,} parameters, float32",
        "grid": str(grid) if grid is not None else "none; --grid names a picture of samples for the model card",
        "licence": request.license or "not stated; --license names one",
        "files": ", ".join(f"{path.relative_to(request.out)} ({size(path.stat().st_size)})" for path in files),
        "load": f'DDPMPipeline.from_pretrained("{request.out}")',
    }
    return "\n".join([f"exported to {request.out}", *(f"  {name:<8} {text}" for name, text in rows.items())])


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
