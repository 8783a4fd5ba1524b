"""One training step: from the loader's micro-batches through its phases to the verdict on them."""

from collections.abc import Iterator
from functools import partial

import torch

from trainer.config import Config
from trainer.config.backbones import class_conditional
from trainer.data.datasets.dataset import SECOND_IMAGES
from trainer.data.images import from_uint8
from trainer.data.stream.stream import BatchLayout
from trainer.diffusion.contract import Batch
from trainer.diffusion.families import FAMILIES
from trainer.diffusion.keyed_noise import KeyedNoise, Stream, keyed_flips, keyed_int
from trainer.diffusion.label_drop import drop_labels
from trainer.diffusion.low_res import low_res_conditioning
from trainer.engine.processes.activity import enter
from trainer.engine.state.train_state import TrainState
from trainer.engine.step.phase_step import PhaseStep
from trainer.engine.step.step_report import PendingVerdict
from trainer.models.backbones import example_cond, example_inputs
from trainer.signals import StopRequest


def device_batch(batch: dict[str, torch.Tensor], config: Config, device: torch.device) -> Batch:
    """Move a micro-batch of the loader to the device, for training.

    batch: "image" (B, C, H, W) uint8, "position" (B,) int64, and what `data.cond` names, of which captions stay behind.
    With `data.flip`, whether an image is flipped, its second images with it, is a function of the seed and its
    position; so is, with `model.label_drop`, whether its label is dropped. What a network that upsamples is given is
    added, see `low_res_conditioning`.
    """
    position = batch["position"].to(device, non_blocking=True)
    flips = keyed_flips(config.seed, position)[:, None, None, None] if config.data.flip else None
    x = _image(batch["image"], device, flips)
    cond = conditioning(batch, config, device, flips)
    cond |= low_res_conditioning(config.model, x, cond, KeyedNoise.training(config.seed, position))
    model = class_conditional(config.model)
    if model is not None and model.null_label is not None:
        kept = cond["label"]
        cond["label"] = drop_labels(
            kept, position, seed=config.seed, probability=model.label_drop, null=model.null_label
        )
    return Batch(x=x, position=position, cond=cond)


def conditioning(
    batch: dict[str, torch.Tensor], config: Config, device: torch.device, flips: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """What `data.cond` names, on the device: second images (B, C, h, w) float32 in [-1, 1], the rest as it is.

    flips: (B, 1, 1, 1) bool, the samples whose second images are mirrored. Captions are no tensors yet.
    """
    return {
        name: _image(batch[name], device, flips) if name in SECOND_IMAGES else batch[name].to(device, non_blocking=True)
        for name in config.data.cond
        if name != "caption"
    }


def _image(pixels: torch.Tensor, device: torch.device, flips: torch.Tensor | None) -> torch.Tensor:
    x = from_uint8(pixels.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last))
    return x if flips is None else torch.where(flips, x.flip(-1), x)


def seed_dropout(position: torch.Tensor, config: Config) -> None:
    """Call before the forward pass of a micro-batch: dropout masks become a function of seed and first position.

    position: of its samples, (B,) int64, on the host.
    """
    if config.model.has_dropout:
        torch.manual_seed(keyed_int(config.seed, Stream.DROPOUT, int(position[0])))


class TrainStep:
    """A sequence of phases, each of which trains one network; the plain step is one phase.

    Its two halves: `backward` computes the gradients of the first phase, `update` applies them where they are finite
    and carries out the other phases. A phase that is not finite leaves its own network unchanged, and no other.
    """

    def __init__(self, *, config: Config, layout: BatchLayout, state: TrainState, stop: StopRequest) -> None:
        self.config = config
        self.layout = layout
        self.state = state
        self.stop = stop
        self.phases = [
            PhaseStep(phase, config=config, layout=layout, state=state)
            for phase in FAMILIES[config.diffusion.kind].phases(state.objective)
            if state.networks[phase.trains].network.trained
        ]
        # Micro-batches of this step, each with its positions on the host, for the phases after the first.
        self._kept: list[tuple[torch.Tensor, Batch]] = []

    def warm_up(self) -> None:
        """Called before the state is loaded: rehearses every phase where the strategy needs it."""
        for phase in self.phases:
            phase.trained.warm_up(partial(self.rehearse, phase))

    def rehearse(self, phase: PhaseStep) -> None:
        """One forward and backward pass of a phase over zeros."""
        with self.state.strategy.device:
            x, *_ = example_inputs(self.config.model, self.layout.micro_batch)
            cond = example_cond(self.config.model, len(x))
            position = torch.zeros(len(x), dtype=torch.int64)
        phase.rehearse(Batch(x=x.contiguous(memory_format=torch.channels_last), position=position, cond=cond))

    def backward(self, stream: Iterator[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Gradients of the first phase; takes the global batch from the stream.

        Returns this rank's mean loss, a scalar on the device.
        """
        self._kept.clear()
        return self.phases[0].backward(self._taken(stream), step=self._step)

    def update(self, loss: torch.Tensor, *, writing: bool = False, copying: bool = False) -> PendingVerdict:
        """Clip and apply the gradients, and carry out the phases that are left.

        `writing`, `copying`: this rank is still writing a checkpoint or uploading one to the mirror.
        """
        enter("update")
        first, *others = self.phases
        own_flags = [torch.full_like(loss, flag) for flag in (bool(self.stop), writing, copying)]
        flags, report = first.update(loss, *own_flags, step=self._step)
        reports = [report]
        for phase in others:
            loss = phase.backward(self._taken_again(), step=self._step)
            enter("update")
            reports.append(phase.update(loss, step=self._step)[1])
        self._kept.clear()
        self.state.position += self.layout.global_batch
        return PendingVerdict(flags, reports)

    @property
    def _step(self) -> int:
        return self.state.position // self.layout.global_batch

    def _taken(self, stream: Iterator[dict[str, torch.Tensor]]) -> Iterator[Batch]:
        """The micro-batches of a step, on the device."""
        for _ in range(self.layout.accumulation):
            enter("data")
            loaded = next(stream)
            enter("forward")
            seed_dropout(loaded["position"], self.config)
            batch = device_batch(loaded, self.config, self.state.strategy.device)
            if len(self.phases) > 1:
                self._kept.append((loaded["position"], batch))
            yield batch

    def _taken_again(self) -> Iterator[Batch]:
        for position, batch in self._kept:
            enter("forward")
            seed_dropout(position, self.config)
            yield batch
