"""Reads weights to start from, in several formats: our names, float32, and the configuration found with them.

No code in the files is executed: safetensors files are preferred, and pickles are loaded with tensors only.
"""

import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trainer.config import Config, DDPMUNetConfig
from trainer.config.reading import explain
from trainer.engine.checkpointing.checkpoints import Checkpoints, read_weights
from trainer.engine.checkpointing.sealed import MANIFEST_NAME
from trainer.engine.run_folder import UNDECIDED, RunFolder
from trainer.engine.state.tensor_files import check_header
from trainer.errors import CheckpointError, ConversionError, brief
from trainer.interop.authors_network import diffusion_section as authors_diffusion
from trainer.interop.authors_network import model_section as authors_model
from trainer.interop.diffusers_settings import diffusion_section, model_section
from trainer.interop.layouts import AUTHORS, DIFFUSERS, DIFFUSERS_OLD, fit, from_layout
from trainer.interop.openai import FIRST, from_openai
from trainer.interop.supported import adm_network, ddpm_sections, network_of
from trainer.models.ddpm_unet import UNet

_DIFFUSERS_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_MOST_SETTINGS_BYTES = 1 << 25  # enough for a table of a million betas
_DATA_PARALLEL = "module."  # prefix of all names in torch.nn.DataParallel


@dataclass(frozen=True, kw_only=True)
class Source:
    """`weights`: the network's state dict. `model`, `diffusion`: sections of a Config, as far as known from the
    source.
    """

    path: Path
    weights: dict[str, Tensor]
    model: dict[str, Any]
    diffusion: dict[str, Any]


def open_source(
    path: Path, *, weights: str | None, image_size: int | None, accelerator: Accelerator, config: Config | None = None
) -> Source:
    """Read a diffusers folder, a state dict in the authors' or OpenAI's layout, a run's folder or one of its
    checkpoints.

    `weights` selects those of a run (default "ema"); `image_size` is for the authors' state dicts, which do not include
    it; `config` describes the network of OpenAI's, which do not. Raises TrainerError with what is missing or wrong,
    also where an option does not apply to the source.
    """
    ours = (path / MANIFEST_NAME).is_file() or (path / "checkpoints").is_dir()
    if weights is not None and not ours:
        raise ConversionError(f"--weights {weights}: {path} is no run or checkpoint of ours, it has one set of weights")
    if image_size is not None and path.is_dir():
        raise ConversionError(f"--image-size {image_size}: {path} says itself what its images are")
    if ours:
        return _from_run(path, weights or "ema", accelerator)
    if path.is_dir():
        return _from_diffusers(path)
    if path.is_file():
        return _from_state_dict(path, image_size, config)
    raise ConversionError(f"{path}: no such file or folder")


def _from_run(path: Path, kind: str, accelerator: Accelerator) -> Source:
    """A checkpoint's identity has network and process; the sampler's variance is in the run's config.toml."""
    single = (path / MANIFEST_NAME).is_file()
    run = RunFolder(path.resolve().parent.parent if single else path, writes=False)
    checkpoint = Checkpoints(run.checkpoints, accelerator).choose(path if single else None)
    saved, manifest = read_weights(checkpoint, kind)
    sections: dict[str, dict[str, Any]] = {"model": {}, "diffusion": {}}
    for name, value in manifest["identity"].items():
        section, _, field = name.partition(".")
        if section in sections and value != UNDECIDED:
            sections[section][field] = value
    if run.config.is_file():
        sections["diffusion"]["variance"] = ddpm_sections(run.load_config())[1].variance
    network = _network(sections["model"], sections["diffusion"], checkpoint)
    weights = fit(saved, network, source=str(checkpoint))
    return Source(path=checkpoint, weights=weights, **sections)


def _from_diffusers(path: Path) -> Source:
    """A pipeline with sub-folders, or a single folder with all files as in the published `google/ddpm-*`."""
    unet = path / "unet" if (path / "unet").is_dir() else path
    model = model_section(_read_json(unet / "config.json"), source=str(unet / "config.json"))
    diffusion: dict[str, Any] = {}
    for scheduler in (path / "scheduler" / "scheduler_config.json", path / "scheduler_config.json"):
        if scheduler.is_file():
            diffusion = diffusion_section(_read_json(scheduler), source=str(scheduler))
            break
    file = next((unet / name for name in _DIFFUSERS_FILES if (unet / name).is_file()), None)
    if file is None:
        raise ConversionError(f"{unet}: holds no {' or '.join(_DIFFUSERS_FILES)}")
    tensors = read_tensors(file)
    layout = DIFFUSERS_OLD if f"{DIFFUSERS_OLD.middle_attention}.query.weight" in tensors else DIFFUSERS
    weights = from_layout(tensors, _network(model, diffusion, unet), layout, source=str(file))
    return Source(path=path, weights=weights, model=model, diffusion=diffusion)


def _from_state_dict(path: Path, image_size: int | None, config: Config | None) -> Source:
    tensors = read_tensors(path)
    if tensors and all(name.startswith(_DATA_PARALLEL) for name in tensors):
        tensors = {name.removeprefix(_DATA_PARALLEL): tensor for name, tensor in tensors.items()}
    if FIRST in tensors:
        if image_size is not None:
            raise ConversionError(f"--image-size {image_size}: {path} is read by --config, which says it")
        network = adm_network(config, str(path))
        weights = from_openai(tensors, network, source=str(path))
        return Source(path=path, weights=weights, model={"kind": network.section.kind}, diffusion={})
    model = authors_model(tensors, image_size, source=str(path))
    diffusion = authors_diffusion(model)
    weights = from_layout(tensors, _network(model, diffusion, path), AUTHORS, source=str(path))
    return Source(path=path, weights=weights, model=model, diffusion=diffusion)


def _network(model: dict[str, Any], diffusion: dict[str, Any], path: Path) -> UNet:
    try:
        return network_of(DDPMUNetConfig.model_validate(model), diffusion.get("variance", "small"))
    except ValidationError as error:
        raise ConversionError(f"{path}: model.{explain(DDPMUNetConfig, error.errors()[0])}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a pickled state dict; from a pickle only tensors are loaded.

    Raises ConversionError where it cannot be read or is something else.
    """
    try:
        if path.suffix == ".safetensors":
            check_header(path)
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, CheckpointError) as error:
        raise ConversionError(f"{path}: cannot be read ({error})") from error
    except Exception as error:  # any error of loading a malformed or malicious pickle; its code is not run
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = "tensors of a known type" if path.suffix == ".safetensors" else "pickle that holds only tensors"
        raise ConversionError(f"{path}: no {what}, so it is not loaded ({reason})") from error
    return _as_state_dict(content, path)


def _as_state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise ConversionError(f"{path}: holds a {type(content).__name__}, should be a state dict: names and tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            shown = name if isinstance(name, str) else brief(name)
            raise ConversionError(f"{path}: {shown}: a {type(value).__name__}; a state dict holds tensors only")
    return dict(content)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = path.stat()  # of a link's target: caches of the Hub consist of links
        if not stat.S_ISREG(found.st_mode) or found.st_size > _MOST_SETTINGS_BYTES:
            raise ConversionError(f"{path}: no file of settings ({found.st_size} bytes)")
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path}: holds no settings")
    return content
