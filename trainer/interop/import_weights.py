"""Makes a run's folder from weights that were trained elsewhere, for sampling or further training."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from trainer.config import Config
from trainer.config.families import is_learned
from trainer.engine.build import build_state
from trainer.engine.checkpointing.checkpoints import Checkpoints
from trainer.engine.processes.collectives import make_accelerator
from trainer.engine.run_folder import RunFolder, identity
from trainer.engine.strategies import DataParallel
from trainer.errors import ConfigError
from trainer.interop.sources import Source, open_source
from trainer.interop.staging import new_folder

# Defaults for further training without --config: the paper's settings at 256 x 256, to be edited in config.toml.
_FINE_TUNING: dict[str, dict[str, Any]] = {
    "data": {"path": "data/CHANGE_ME", "flip": False},
    "optimizer": {"learning_rate": 2e-5, "warmup": "5000 steps"},
    "train": {"duration": "100k steps", "global_batch": 64},
    "checkpoint": {"every": "10k steps"},
    "log": {"every": "100 steps", "samples_every": "10k steps"},
}
# Fields that may be chosen freely, since the weights do not depend on them.
_FREE = {"model.dropout", "diffusion.variance", "diffusion.loss", "diffusion.timestep_sampling"}


def import_weights(
    path: Path,
    *,
    out: Path,
    config_path: Path | None,
    overrides: Sequence[str],
    weights: str | None,
    image_size: int | None,
) -> None:
    """Make a run's folder whose only checkpoint, of step 0, holds the weights as raw and as averaged ones.

    Raises TrainerError where the source is not supported, the configuration is for another network, or `out` exists.
    """
    accelerator = make_accelerator()
    chosen = None if config_path is None else Config.load(config_path, overrides)
    source = open_source(path, weights=weights, image_size=image_size, accelerator=accelerator, config=chosen)
    config = chosen or _described(source, out, overrides)
    _check_agreement(source, config)
    config = config.model_copy(update={"run_dir": str(out)})
    with new_folder(out) as staging:
        make_run(staging, config, source.weights, accelerator, event="imported", source=str(source.path))
    print(
        f"{source.path} in {out}: draw with `python trainer/sample.py --run {out}`; to train further, "
        f"set data.path and the rest in {out / 'config.toml'} and give it to trainer/train.py"
    )


def make_run(
    path: Path,
    config: Config,
    weights: Mapping[str, torch.Tensor],
    accelerator: Accelerator,
    *,
    event: str,
    **details: Any,
) -> None:
    """Write a run's folder: one checkpoint, of step 0, with a network's state dict as raw and as averaged weights.

    The journal records its origin as `event`. Errors as `Checkpoints.save`.
    """
    plain = config.train.model_copy(update={"strategy": "ddp", "precision": "fp32", "freeze": []})
    state = build_state(config.model_copy(update={"train": plain}), DataParallel(plain))
    state.main.set_weights(weights)
    folder = RunFolder(path, writes=True)
    folder.save_config(config)
    saved = Checkpoints(folder.checkpoints, accelerator).save(state.contents(), step=0, identity=identity(config, None))
    folder.event(event, step=0, checkpoint=saved.name, **details)


def _described(source: Source, out: Path, overrides: Sequence[str]) -> Config:
    """The configuration that the source itself gives."""
    raw: dict[str, Any] = {
        "run_dir": str(out),
        **copy.deepcopy(_FINE_TUNING),  # copied, since overrides modify it
        "model": dict(source.model),
        "diffusion": dict(source.diffusion),
    }
    return Config.parse(raw, overrides, source=f"{source.path} (choose by --set what it does not say)")


def _check_agreement(source: Source, config: Config) -> None:
    """Raises ConfigError where the configuration differs from what the source says of itself."""
    for section, said in (("model", {"kind": "ddpm-unet"} | source.model), ("diffusion", source.diffusion)):
        for field, value in said.items():
            chosen = getattr(getattr(config, section), field)
            # A variance that is learned, or was, says what half of the output means.
            free = f"{section}.{field}" in _FREE and not (field == "variance" and any(map(is_learned, (chosen, value))))
            if chosen != value and not free:
                raise ConfigError(f"{section}.{field} = {chosen!r}: the weights in {source.path} have {value!r}")
