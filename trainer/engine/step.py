"""One optimizer step: noise the images, predict, accumulate, clip, update; no host sync on the way."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist

from trainer.config import Config
from trainer.data.stream import BatchLayout
from trainer.diffusion.noise import Stream, keyed_flips, keyed_int, keyed_normal
from trainer.diffusion.objectives import Objective
from trainer.diffusion.process import GaussianDiffusion
from trainer.engine.gradient_squares import GradientSquare
from trainer.engine.state import TrainState
from trainer.engine.strategies import Strategy
from trainer.engine.verdict import PendingVerdict, StepBatches
from trainer.engine.watchdog import enter
from trainer.signals import StopRequest
from trainer.telemetry.meters import step_sums


def noised_inputs(
    batch: dict[str, torch.Tensor], config: Config, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, their positions and their noise in a micro-batch, a pure function of the seed and the positions.

    Returns x0 (B, C, H, W) float32 in [-1, 1], flipped where `data.flip` says so and its key falls so; position (B,)
    int64; eps like x0.
    """
    position = batch["position"].to(device, non_blocking=True)
    images = batch["image"].to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
    x0 = images.float() / 127.5 - 1
    if config.data.flip:
        x0 = torch.where(keyed_flips(config.seed, position)[:, None, None, None], x0.flip(-1), x0)
    eps = keyed_normal(config.seed, Stream.EPS, position, tuple(x0.shape[1:]))
    return x0, position, eps


def seed_dropout(batch: dict[str, torch.Tensor], config: Config) -> None:
    """Before the forward pass of a micro-batch: dropout's mask is a function of the seed and its first position."""
    if config.model.dropout > 0:
        torch.manual_seed(keyed_int(config.seed, Stream.DROPOUT, int(batch["position"][0])))


class _Drawn(NamedTuple):
    """The timesteps of some images, their unweighted losses and terms of the bound, and weights; each (B,)."""

    t: torch.Tensor
    losses: torch.Tensor
    bound: torch.Tensor
    weight: torch.Tensor | None

    @classmethod
    def join(cls, parts: list["_Drawn"]) -> "_Drawn":
        """Of all micro-batches, in their order."""
        t, losses, bound, weights = zip(*parts, strict=True)
        return cls(
            torch.cat(t), torch.cat(losses), torch.cat(bound), None if weights[0] is None else torch.cat(weights)
        )


class TrainStep:
    """The two halves of a step: `backward` fills the gradients, `update` applies them where they are finite."""

    def __init__(
        self,
        *,
        config: Config,
        layout: BatchLayout,
        strategy: Strategy,
        state: TrainState,
        diffusion: GaussianDiffusion,
        stop: StopRequest,
    ) -> None:
        self.config = config
        self.layout = layout
        self.strategy = strategy
        self.state = state
        self.diffusion = diffusion
        self.objective = Objective(
            diffusion,
            prediction=config.diffusion.prediction,
            variance=config.diffusion.variance,
            loss=config.diffusion.loss,
        )
        self._drawn: _Drawn | None = None  # by the last `backward`
        self.stop = stop
        self.gradient_square = GradientSquare(strategy, layout)

    def learning_rate(self, step: int) -> float:
        """The rate of step 0, 1, ...: lr x min(step / warmup, 1), so that the first step moves nothing (Ho et al.)."""
        warmup = self.config.optimizer.warmup.steps(self.layout.global_batch)
        return self.config.optimizer.learning_rate * (min(step / warmup, 1.0) if warmup else 1.0)

    def rehearse(self) -> None:
        """One forward and backward pass over nothing, for strategies that have to warm up."""
        model = self.config.model
        shape = (self.layout.micro_batch, model.channels, model.image_size, model.image_size)
        zeros = torch.zeros(shape, device=self.strategy.device).contiguous(memory_format=torch.channels_last)
        t = torch.zeros(len(zeros), dtype=torch.int64, device=zeros.device)
        with self.strategy.accumulate(is_last=True):
            self.strategy.backward(self.strategy.network(zeros, t).square().mean())

    def backward(self, stream: Iterator[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Gradients of one global batch, accumulated over micro-batches and averaged over ranks.

        Returns this rank's mean loss, a scalar on the device.
        """
        losses, drawn = [], []
        self.gradient_square.begin_step(self.state.position // self.layout.global_batch)
        accumulation = self.layout.accumulation
        for micro_step in range(accumulation):
            enter("data")
            batch = next(stream)
            enter("forward")
            seed_dropout(batch, self.config)
            x0, position, eps = noised_inputs(batch, self.config, self.strategy.device)
            t, weight = self.state.timesteps.draw(position)
            x_t = self.diffusion.q_sample(x0, t, eps)
            with self.strategy.accumulate(is_last=micro_step == accumulation - 1):
                unweighted, bound = self.objective.losses_and_bound(
                    self.strategy.network(x_t, t), x0=x0, x_t=x_t, t=t, eps=eps
                )
                loss = (unweighted if weight is None else weight * unweighted).mean() / accumulation
                enter("backward")
                self.strategy.backward(loss)
            self.gradient_square.after_micro_batch(micro_step)
            losses.append(loss.detach())
            drawn.append(_Drawn(t, unweighted.detach(), bound, weight))
        self._drawn = _Drawn.join(drawn)
        return torch.stack(losses).sum()

    def update(self, loss: torch.Tensor, *, writing: bool = False, copying: bool = False) -> PendingVerdict:
        """Clip and apply the gradients on all ranks, or on none if any rank's loss or gradient is not finite.

        The decision is taken on the device, see `GuardedAdam`. `writing`, `copying`: this rank still writes a
        checkpoint, still copies one.
        """
        enter("update")
        assert self._drawn is not None
        flags = [torch.full_like(loss, flag) for flag in (bool(self.stop), writing, copying)]
        scalars = torch.stack([loss / self.layout.world_size, *flags, self.gradient_square.read()])
        report = torch.cat([scalars, step_sums(*self._drawn, timesteps=self.diffusion.timesteps)])
        if self.layout.world_size > 1:
            dist.all_reduce(report)
        optimizer = self.strategy.optimizer
        step = self.state.position // self.layout.global_batch
        optimizer.prepare_step(learning_rate=self.learning_rate(step), loss=report[0])
        self.strategy.step()
        self.state.timesteps.record(self._drawn.t, self._drawn.losses, found_inf=optimizer.skipped)
        self.state.position += self.layout.global_batch
        batches = StepBatches(
            world_size=self.layout.world_size,
            images=self.layout.global_batch,
            small=self.gradient_square.batch,
            timesteps=self.diffusion.timesteps,
        )
        return PendingVerdict(torch.cat([optimizer.grad_norm[None], report]), batches)
