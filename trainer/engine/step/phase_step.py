"""One phase of a training step: losses, gradients and update of one network, without synchronising with the device."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import nn

from trainer.config import Config
from trainer.data.stream.stream import BatchLayout
from trainer.diffusion.contract import MODEL, Batch, Losses, Phase
from trainer.diffusion.keyed_noise import KeyedNoise
from trainer.engine.processes.activity import enter
from trainer.engine.state.train_state import TrainState
from trainer.engine.step.gradient_noise import GradientSquare
from trainer.engine.step.step_report import PhaseReport
from trainer.telemetry.meters import step_sums


class PhaseStep:
    """The two halves of a phase: `backward` computes the network's gradients, `update` applies them where they are
    finite.
    """

    def __init__(self, phase: Phase, *, config: Config, layout: BatchLayout, state: TrainState) -> None:
        self.phase = phase
        self.config = config
        self.layout = layout
        self.objective = state.objective
        self.trained = state.networks[phase.trains].network
        self.gradient_square = GradientSquare(self.trained, layout)
        self._networks: Mapping[str, nn.Module] = {
            name: each.network.module if each.network is self.trained else each.network.fixed_module
            for name, each in state.networks.items()
        }
        self._others = [each.network for each in state.networks.values() if each.network is not self.trained]
        self._device = state.strategy.device
        self._losses: Losses | None = None  # of the last micro-batches, set by `backward`

    def rehearse(self, batch: Batch) -> None:
        """One forward and backward pass, for strategies that need a warm-up."""
        with self._others_fixed(), self.trained.accumulate(is_last=True):
            self.trained.backward(self._compute(batch).mean())

    def backward(self, batches: Iterable[Batch], *, step: int) -> torch.Tensor:
        """Gradients of one global batch, accumulated over micro-batches and averaged over ranks.

        Returns this rank's mean loss, a scalar on the device.
        """
        means, losses, accumulation = [], [], self.layout.accumulation
        self.gradient_square.begin_step(step)
        with self._others_fixed():
            for micro_step, batch in enumerate(batches):
                with self.trained.accumulate(is_last=micro_step == accumulation - 1):
                    computed = self._compute(batch)
                    loss = computed.mean() / accumulation
                    enter("backward")
                    self.trained.backward(loss)
                self.gradient_square.after_micro_batch(micro_step)
                means.append(loss.detach())
                losses.append(computed.detach())
        self._losses = Losses.join(losses)
        return torch.stack(means).sum()

    def learning_rate(self, step: int) -> float:
        """The rate of step 0, 1, ...: lr x min(step / warmup, 1), hence 0 in step 0 (Ho et al.), times what the
        schedule leaves of it.
        """
        optimizer = self.config.optimizer.of(self.phase.trains)
        warmup = optimizer.warmup.steps(self.layout.global_batch)
        rate = optimizer.learning_rate * (min(step / warmup, 1.0) if warmup else 1.0)
        if optimizer.schedule == "constant":
            return rate
        done = step / self.config.train.duration.steps(self.layout.global_batch)
        return rate * (1 - done if optimizer.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))

    def update(self, loss: torch.Tensor, *flags: torch.Tensor, step: int) -> tuple[torch.Tensor, PhaseReport]:
        """Clip and apply the gradients on all ranks; on none if any rank's loss or gradient is not finite.

        The decision is made on the device, see `GuardedAdam`. flags: scalars to be summed over the ranks. Returns these
        sums, (len(flags),), and the phase's report.
        """
        losses = self._losses
        assert losses is not None
        scalars = [*flags, loss / self.layout.world_size, self.gradient_square.read(self._device)]
        sums = torch.cat([torch.stack(scalars), step_sums(losses)])
        if self.layout.world_size > 1:
            dist.all_reduce(sums)
        summed_flags, sums = sums[: len(flags)], sums[len(flags) :]
        optimizer = self.trained.optimizer
        optimizer.prepare_step(learning_rate=self.learning_rate(step), loss=sums[0])
        self.trained.step()
        if self.phase.trains == MODEL:
            self._record(losses, skipped=optimizer.skipped)
        return summed_flags, PhaseReport(
            values=torch.cat([optimizer.grad_norm[None], sums]),
            network=self.phase.trains,
            layout=self.layout,
            small_batch=self.gradient_square.batch,
            bound_terms=self.objective.bound_terms,
            losses=losses,
        )

    def _compute(self, batch: Batch) -> Losses:
        noise = KeyedNoise.training(self.config.seed, batch.position)
        return self.phase.losses(self._networks, batch, noise)

    @contextmanager
    def _others_fixed(self) -> Iterator[None]:
        with ExitStack() as stack:
            for network in self._others:
                stack.enter_context(network.fixed())
            yield

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
