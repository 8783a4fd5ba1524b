"""What the tests of several networks share: runs and steps of a DDPM with a critic."""

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from tests.harness import (
    launch,
    load_config,
    overrides,
    write_config,
)
from trainer.config import Config
from trainer.data.stream.stream import BatchLayout
from trainer.engine.build import build_state
from trainer.engine.checkpointing.checkpoints import Checkpoints
from trainer.engine.step.step_report import Verdict
from trainer.engine.step.train_step import TrainStep
from trainer.engine.strategies import DataParallel
from trainer.signals import StopRequest

ADVERSARIAL = overrides(diffusion__kind="adversarial", model__dropout=0.0)
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
FREEZE = 'train.freeze=["down.*", "critic.conv.*"]'


def run(processes: int, config: Path, *arguments: str, **how: Any) -> str:
    return launch(processes, "--config", str(config), *ADVERSARIAL, *arguments, family="tests.two_networks", **how)


def adversarial(folder: Path, *settings: str) -> Config:
    chosen = ("diffusion.kind=adversarial", "model.dropout=0.0", "optimizer.warmup=0 steps")
    return load_config(write_config(folder, folder), *chosen, *settings)


def made_step(config: Config) -> TrainStep:
    layout = BatchLayout.plan(config.train.global_batch, 1, config.train.micro_batch)
    state = build_state(config, DataParallel(config.train))
    return TrainStep(config=config, layout=layout, state=state, stop=StopRequest())


def images(step: TrainStep) -> Iterator[dict[str, torch.Tensor]]:
    """The same global batch in every step."""
    size, generator = step.layout.micro_batch, torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (step.layout.global_batch, 3, 8, 8), generator=generator).to(torch.uint8)
    parts = zip(pixels.split(size), torch.arange(len(pixels)).split(size), strict=True)
    return cycle([{"image": image, "position": position} for image, position in parts])


def take(step: TrainStep) -> Verdict:
    verdict = step.update(step.backward(images(step))).read()
    for each in verdict.networks:
        if each.finite:
            step.state.networks[each.network].updated()
    return verdict


def tensors(step: TrainStep, *kinds: str) -> dict[str, torch.Tensor]:
    found = {piece.name: piece.values.clone() for piece in step.state.contents().slices}
    return {name: value for name, value in found.items() if not kinds or name.partition("/")[0] in kinds}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name.partition("/")[0] for name, value in before.items() if not torch.equal(value, after[name])}


def saved(folder: Path, *settings: str, spoil: str | None = None) -> Path:
    """A checkpoint of step 0; of the parameter `spoil` one value is not a number."""
    state = made_step(adversarial(folder, *settings)).state
    for piece in state.main.network.slices:
        if piece.name == spoil:
            piece.weight.view(-1)[-1] = torch.nan
    return Checkpoints(folder / "checkpoints", state.strategy.accelerator).save(state.contents(), step=0, identity={})
