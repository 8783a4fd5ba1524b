"""One optimizer step: losses, gradients, accumulation, clipping, update; without synchronising with the device."""

from collections.abc import Iterator

import torch
import torch.distributed as dist

from trainer.config import Config
from trainer.data.datasets.dataset import SECOND_IMAGES
from trainer.data.stream.stream import BatchLayout
from trainer.diffusion.contract import Batch, Losses
from trainer.diffusion.keyed_noise import KeyedNoise, Stream, keyed_flips, keyed_int
from trainer.engine.processes.watchdog import enter
from trainer.engine.state.train_state import TrainState
from trainer.engine.step.gradient_noise import GradientSquare
from trainer.engine.step.step_report import PendingVerdict, StepBatches
from trainer.engine.strategies import Strategy
from trainer.models.backbones import example_inputs
from trainer.signals import StopRequest
from trainer.telemetry.meters import step_sums
from trainer.telemetry.pictures import from_uint8


def device_batch(batch: dict[str, torch.Tensor], config: Config, device: torch.device) -> Batch:
    """Move a micro-batch of the loader to the device.

    batch: "image" (B, C, H, W) uint8, "position" (B,) int64, and what `data.cond` names, of which captions stay behind.
    With `data.flip`, whether an image is flipped, its second images with it, is a function of the seed and its
    position.
    """
    position = batch["position"].to(device, non_blocking=True)
    flips = keyed_flips(config.seed, position)[:, None, None, None] if config.data.flip else None
    x = _image(batch["image"], device, flips)
    return Batch(x=x, position=position, cond=conditioning(batch, config, device, flips))


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


def seed_dropout(batch: dict[str, torch.Tensor], config: Config) -> None:
    """Call before the forward pass of a micro-batch: dropout masks become a function of seed and first position."""
    torch.manual_seed(keyed_int(config.seed, Stream.DROPOUT, int(batch["position"][0])))


class TrainStep:
    """The two halves of a step: `backward` computes the gradients, `update` applies them where they are finite."""

    def __init__(
        self,
        *,
        config: Config,
        layout: BatchLayout,
        strategy: Strategy,
        state: TrainState,
        stop: StopRequest,
    ) -> None:
        self.config = config
        self.layout = layout
        self.strategy = strategy
        self.state = state
        self.objective = state.objective
        self._losses: Losses | None = None  # of the last micro-batches, set by `backward`
        self.stop = stop
        self.gradient_square = GradientSquare(strategy, layout)

    def learning_rate(self, step: int) -> float:
        """The rate of step 0, 1, ...: lr x min(step / warmup, 1), hence 0 in step 0 (Ho et al.)."""
        warmup = self.config.optimizer.warmup.steps(self.layout.global_batch)
        return self.config.optimizer.learning_rate * (min(step / warmup, 1.0) if warmup else 1.0)

    def rehearse(self) -> None:
        """One forward and backward pass over zeros, for strategies that need a warm-up."""
        with self.strategy.device:
            x, t, cond = example_inputs(self.config.model, self.layout.micro_batch)
        x = x.contiguous(memory_format=torch.channels_last)
        with self.strategy.accumulate(is_last=True):
            self.strategy.backward(self.strategy.network(x, t, **cond).square().mean())

    def backward(self, stream: Iterator[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Gradients of one global batch, accumulated over micro-batches and averaged over ranks.

        Returns this rank's mean loss, a scalar on the device.
        """
        means, losses = [], []
        self.gradient_square.begin_step(self.state.position // self.layout.global_batch)
        accumulation = self.layout.accumulation
        for micro_step in range(accumulation):
            enter("data")
            batch = next(stream)
            enter("forward")
            seed_dropout(batch, self.config)
            inputs = device_batch(batch, self.config, self.strategy.device)
            noise = KeyedNoise.training(self.config.seed, inputs.position)
            with self.strategy.accumulate(is_last=micro_step == accumulation - 1):
                computed = self.objective.training_losses(self.strategy.network, inputs, noise)
                loss = computed.mean() / accumulation
                enter("backward")
                self.strategy.backward(loss)
            self.gradient_square.after_micro_batch(micro_step)
            means.append(loss.detach())
            losses.append(computed.detach())
        self._losses = Losses.join(losses)
        return torch.stack(means).sum()

    def update(self, loss: torch.Tensor, *, writing: bool = False, copying: bool = False) -> PendingVerdict:
        """Clip and apply the gradients on all ranks; on none if any rank's loss or gradient is not finite.

        The decision is made on the device, see `GuardedAdam`. `writing`, `copying`: this rank is still writing a
        checkpoint or uploading one to the mirror.
        """
        enter("update")
        losses = self._losses
        assert losses is not None
        flags = [torch.full_like(loss, flag) for flag in (bool(self.stop), writing, copying)]
        scalars = torch.stack([loss / self.layout.world_size, *flags, self.gradient_square.read()])
        report = torch.cat([scalars, step_sums(losses)])
        if self.layout.world_size > 1:
            dist.all_reduce(report)
        optimizer = self.strategy.optimizer
        step = self.state.position // self.layout.global_batch
        optimizer.prepare_step(learning_rate=self.learning_rate(step), loss=report[0])
        self.strategy.step()
        self._record(losses, skipped=optimizer.skipped)
        self.state.position += self.layout.global_batch
        batches = StepBatches(
            world_size=self.layout.world_size,
            images=self.layout.global_batch,
            small=self.gradient_square.batch,
            bound_terms=self.objective.bound_terms,
        )
        return PendingVerdict(torch.cat([optimizer.grad_norm[None], report]), batches)

    def _record(self, losses: Losses, *, skipped: torch.Tensor) -> None:
        """Record the losses of all ranks in the objective (importance sampling); none where `skipped`, a scalar, is not
        0.

        They are in the order of the images' positions, so the result does not depend on the number of ranks.
        """
        recorded = self.objective.tensors()
        if not recorded:
            return
        before = {name: tensor.clone() for name, tensor in recorded.items()}
        self.objective.record(_of_all_ranks(losses.t), _of_all_ranks(losses.loss))
        for name, tensor in recorded.items():
            tensor.copy_(torch.where(skipped.bool(), before[name], tensor))


def _of_all_ranks(part: torch.Tensor) -> torch.Tensor:
    """All-gather of the ranks' parts of a global batch, which are contiguous in position, in rank order."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return part
    whole = part.new_empty(dist.get_world_size() * len(part))
    dist.all_gather_into_tensor(whole, part.contiguous())
    return whole
