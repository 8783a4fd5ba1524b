"""A run's weights as a folder that diffusers.DDPMPipeline and DDIMPipeline load."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from trainer.engine.build import unet_config
from trainer.engine.checkpoints import Checkpoints, read_weights
from trainer.engine.processes import make_accelerator
from trainer.engine.run import RunFolder
from trainer.interop.diffusers_settings import scheduler_settings, unet_settings
from trainer.interop.layouts import DIFFUSERS, fit, to_layout
from trainer.interop.model_card import model_card
from trainer.interop.staging import new_folder

_MODEL_INDEX = {
    "_class_name": "DDPMPipeline",
    "scheduler": ["diffusers", "DDPMScheduler"],
    "unet": ["diffusers", "UNet2DModel"],
}


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """Which weights of which run, and where to put them; `command` and `license` are for the model card."""

    run: Path
    checkpoint: Path | None
    weights: str
    out: Path
    license: str | None
    command: str


def export(request: ExportRequest) -> None:
    """Write model_index.json, unet/, scheduler/ and README.md.

    Raises TrainerError where run or checkpoint cannot be used, diffusers has no such network, or `out` exists.
    """
    run = RunFolder(request.run, writes=False)
    config = run.load_config()
    network = unet_config(config.model, config.diffusion.variance)
    settings, scheduler = unet_settings(network), scheduler_settings(config)
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
        card = model_card(
            config,
            manifest,
            checkpoint=checkpoint.name,
            weights=request.weights,
            parameters=sum(tensor.numel() for tensor in weights.values()),
            license_name=request.license,
            command=request.command,
        )
        (folder / "README.md").write_text(card)
    print(f"{request.weights} weights of {checkpoint} in {request.out}")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
