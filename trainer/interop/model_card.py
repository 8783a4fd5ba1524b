"""The README.md (model card) of an exported model: what it is, how it was trained, how to load it."""

import json
from collections.abc import Iterator
from typing import Any

from trainer import __version__
from trainer.config import Config, DDPMConfig
from trainer.data.training_data import DATA_FINGERPRINT
from trainer.engine.run_folder import UNDECIDED

_KINDS = {"ema": "exponential moving average of the weights", "model": "raw weights, not averaged"}
# Sections that determine the weights; the others concern paths and logging.
_SECTIONS = ("model", "diffusion", "optimizer", "train")


def model_card(
    config: Config,
    diffusion: DDPMConfig,
    manifest: dict[str, Any],
    *,
    checkpoint: str,
    weights: str,
    parameters: int,
    license_name: str | None,
    grid: str | None,
    command: str,
) -> str:
    """Markdown with the metadata of the Hugging Face Hub; `manifest` is the checkpoint's, `grid` the path of a picture
    of samples relative to the card.
    """
    size, timesteps = config.model.image_size, diffusion.timesteps
    kind = {1: "grey", 3: "RGB"}.get(config.model.channels, f"{config.model.channels}-channel")
    license_line = f"license: {license_name}\n" if license_name else ""
    picture = f"![Samples]({grid})\n\n" if grid is not None else ""
    facts = "\n".join(
        f"| {name} | {value} |" for name, value in _facts(config, manifest, checkpoint, weights, parameters)
    )
    fields = "\n".join(f"| `{name}` | `{value}` |" for name, value in _fields(config))
    return f"""---
{license_line}library_name: diffusers
tags:
- diffusers
- ddpm
- unconditional-image-generation
---

# Unconditional diffusion model, {size} x {size}

A denoising diffusion probabilistic model (Ho, Jain, Abbeel 2020) that draws {size} x {size} {kind} images.

{picture}Licence of the weights: {license_name or "not stated; ask who gave them to you"}.

| | |
|---|---|
{facts}

## Use

```python
{_usage(timesteps, learned=diffusion.variance_is_learned)}
```

## Configuration

| field | value |
|---|---|
{fields}

## Origin

```bash
{command}
```
"""


def _facts(
    config: Config, manifest: dict[str, Any], checkpoint: str, weights: str, parameters: int
) -> Iterator[tuple[str, str]]:
    position = manifest["state"]["position"]
    data = manifest["identity"].get(DATA_FINGERPRINT)
    trained = data is not None and data != UNDECIDED
    yield "weights", _kind(weights) + (f", decay {config.train.ema_decay}" if weights == "ema" and trained else "")
    yield "parameters", f"{parameters:,}"
    yield "checkpoint", f"{checkpoint}, written by ddpm-trainer {manifest['trainer_version']}"
    yield "optimizer steps", f"{manifest['step']:,}"
    yield "images seen", f"{position:,}"
    yield "data", f"fingerprint {data}" if trained else "imported weights that were not trained further"
    yield "exported by", f"ddpm-trainer {__version__}"


def _fields(config: Config) -> Iterator[tuple[str, str]]:
    values = config.model_dump(mode="json", exclude_none=True)
    for section in _SECTIONS:
        for name, value in values[section].items():
            yield f"{section}.{name}", json.dumps(value)
    yield "data.flip", json.dumps(values["data"]["flip"])
    yield "seed", json.dumps(values["seed"])


def _usage(timesteps: int, *, learned: bool) -> str:
    ddpm = f'images = DDPMPipeline.from_pretrained("FOLDER")(num_inference_steps={timesteps}).images'
    if learned:  # DDIMPipeline treats the variance as part of the prediction
        return f"from diffusers import DDPMPipeline\n\n{ddpm}"
    return f"""from diffusers import DDIMPipeline, DDPMPipeline

{ddpm}
pipeline = DDIMPipeline.from_pretrained("FOLDER")  # fewer steps
images = pipeline(num_inference_steps={min(50, timesteps)}, use_clipped_model_output=True).images"""


def _kind(weights: str) -> str:
    """A description of the weights; "ema-0.1" is the average with a power-function profile of relative width 0.1."""
    if weights in _KINDS:
        return _KINDS[weights]
    return f"power-function average of the weights, sigma_rel {weights.removeprefix('ema-')} (Karras et al. 2024)"
