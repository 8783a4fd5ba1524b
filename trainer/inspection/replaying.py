"""Replays a step that was not finite: same images, flips, t, eps and dropout, with the weights of a checkpoint."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from trainer.config import Config
from trainer.data.stream.batches import read_batch
from trainer.data.training_data import TrainingData, open_training_data
from trainer.diffusion.contract import MODEL, one_phase
from trainer.diffusion.families import FAMILIES
from trainer.diffusion.keyed_noise import KeyedNoise
from trainer.diffusion.time_distribution import GivenTimes
from trainer.engine.build import build_networks, build_objective
from trainer.engine.checkpointing.checkpoints import read_weights
from trainer.engine.network.freezing import freeze
from trainer.engine.network.precision import run_in
from trainer.engine.run_folder import RunFolder, check_identity, identity
from trainer.engine.step.nonfinite_dump import NonFiniteDump
from trainer.engine.step.train_step import device_batch, seed_dropout
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.inspection import folders
from trainer.inspection.origin import GradientNorm, Origin, Watch, gradient_norms
from trainer.inspection.text import table
from trainer.models.stages import checkpoint_activations

_LISTED = 32  # samples listed where no single one has a loss that is not finite


@dataclass(kw_only=True)
class Outcome:
    """Results of a step. losses: one per sample, unweighted; loss: of the global batch; norms: of the gradient, by
    module.
    """

    losses: list[float] = field(default_factory=list)
    loss: float = 0.0
    forward: Origin | None = None
    backward: Origin | None = None
    norms: list[GradientNorm] = field(default_factory=list)

    @property
    def grad_norm(self) -> float:
        """Gradient norm of the whole network, before clipping."""
        return math.sqrt(sum(module.norm**2 for module in self.norms))

    @property
    def finite(self) -> bool:
        """Whether the step would be applied."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A dumped step and its replayed results, computed on `device` with the weights of a checkpoint after `updates`
    steps.
    """

    dump: NonFiniteDump
    checkpoint: Path
    updates: int
    device: str
    outcome: Outcome


def replay(path: Path, *, checkpoint: Path | None, device: torch.device) -> Replay:
    """Compute the dumped step in this process, one micro-batch after another.

    checkpoint: None for the newest undamaged one of the run that is not later than the step. Raises TrainerError where
    dump, checkpoint, configuration or data cannot be used or do not belong together.
    """
    dump = NonFiniteDump.read(path)
    if dump.network != MODEL:
        raise DataError(f"{path}: of the network {dump.network!r}; only steps of {MODEL!r} can be computed again")
    run = path.resolve().parent.parent
    config = _as_dumped(RunFolder(run, writes=False).load_config(), dump, path)
    if FAMILIES[config.diffusion.kind].phases is not one_phase:
        raise ConfigError(f"{path}: steps of several phases cannot be computed again")
    data = open_training_data(config, index_folder=None)
    if checkpoint is None:
        checkpoint = _newest_before(run, dump.step)
    else:
        folders.check(checkpoint)
    weights, manifest = read_weights(checkpoint, "model")
    check_identity(manifest["identity"], identity(config, data), checkpoint)
    networks = build_networks(config)
    freeze(networks, config.train.freeze)
    network = networks[MODEL]
    network.load_state_dict(weights)
    kind = config.train.activation_checkpointing
    checkpoint_activations(network, "full" if kind == "budget" else kind)  # results do not depend on it
    network.train().to(device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stubs
    run_in(config.train.precision, network, device)
    scaler = manifest["state"].get("scaler")
    return Replay(
        dump=dump,
        checkpoint=checkpoint,
        updates=manifest["state"]["updates"],
        device=device.type,
        outcome=_compute(
            network, dump, config=config, data=data, device=device, scale=scaler["scale"] if scaler else 1.0
        ),
    )


def as_text(result: Replay) -> str:
    """The replay as text."""
    dump, outcome = result.dump, result.outcome
    lines = [
        f"step {dump.step}: loss {dump.loss}, gradient norm {dump.grad_norm}",
        f"replayed at {result.checkpoint}, {_whose_weights(result)}",
        f"loss {outcome.loss:.6g}, gradient norm {outcome.grad_norm:.6g}: "
        + ("finite; NOT reproduced" if outcome.finite else "not finite again"),
    ]
    if result.device != dump.device:
        lines.append(f"computed on {result.device}, the step was on {dump.device}: dropout and rounding differ")
    lines += _about_samples(dump, outcome.losses)
    timesteps = {sample.position: sample.t for sample in dump.samples}
    for what, origin in (("output", outcome.forward), ("gradient of its output", outcome.backward)):
        if origin is not None:
            who = ", ".join(f"{position} (t {timesteps[position]})" for position in origin.positions[:_LISTED])
            lines.append(f"first module whose {what} is not finite: {origin.module} ({origin.kind}), samples {who}")
    norms = [[module.module, f"{module.norm:.4g}", f"{module.nonfinite:,}"] for module in outcome.norms]
    return "\n".join(lines + table(["module", "gradient norm", "not finite"], norms))


def _about_samples(dump: NonFiniteDump, losses: list[float]) -> list[str]:
    """The samples whose loss is not finite, or all where there is none."""
    all_of_them = list(zip(dump.samples, losses, strict=True))
    bad = [(sample, loss) for sample, loss in all_of_them if not math.isfinite(loss)]
    shown = bad or all_of_them
    rows = [[str(s.position), str(s.t), f"{loss:.6g}", s.image] for s, loss in shown[:_LISTED]]
    lines = [f"samples whose loss is not finite: {len(bad)} of {len(all_of_them)}"]
    lines += table(["position", "t", "loss", "image"], rows)
    return lines if len(shown) <= _LISTED else [*lines, f"  and {len(shown) - _LISTED} more"]


def _compute(
    network: nn.Module,
    dump: NonFiniteDump,
    *,
    config: Config,
    data: TrainingData,
    device: torch.device,
    scale: float,
) -> Outcome:
    """Forward and backward passes of the step, with the loss multiplied by `scale` as in fp16 training."""
    objective = build_objective(config, device)
    replace_by = data.order if config.data.on_bad_sample == "skip" else None
    outcome = Outcome()
    accumulation = len(dump.samples) // dump.micro_batch
    for first in range(0, len(dump.samples), dump.micro_batch):
        samples = dump.samples[first : first + dump.micro_batch]
        positions = [sample.position for sample in samples]
        batch = read_batch(data.dataset, (positions, [sample.id for sample in samples]), replace_by=replace_by)
        seed_dropout(batch["position"], config)
        inputs = device_batch(batch, config, device)
        times = GivenTimes(
            torch.tensor([sample.t for sample in samples], device=device),
            torch.tensor([1.0 if s.weight is None else s.weight for s in samples], device=device),
        )
        noise = KeyedNoise.training(config.seed, inputs.position)
        with Watch(network, positions) as watch:
            losses = objective.training_losses(network, inputs, noise, times=times)
        loss = losses.mean() / accumulation
        (loss * scale).backward()
        outcome.losses += losses.loss.tolist()
        outcome.loss += loss.item()
        outcome.forward = outcome.forward or watch.forward
        outcome.backward = outcome.backward or watch.backward
    outcome.norms = gradient_norms(network, divided_by=scale)
    return outcome


def _as_dumped(config: Config, dump: NonFiniteDump, path: Path) -> Config:
    """The run's configuration, with the precision in which the step was computed."""
    if config.seed != dump.seed:
        raise ConfigError(f"{path}: of a run with seed {dump.seed}, config.toml beside it has {config.seed}")
    if not dump.samples or len(dump.samples) % dump.micro_batch:
        raise ConfigError(f"{path}: {len(dump.samples)} samples are no whole micro-batches of {dump.micro_batch}")
    train = config.train.model_copy(update={"precision": dump.precision})
    return config.model_copy(update={"train": train})


def _newest_before(run: Path, step: int) -> Path:
    """The newest undamaged checkpoint up to `step`, inclusive: a skipped step does not change the weights."""
    steps = folders.steps_in(folders.require_run(run) / "checkpoints")
    for found in sorted((found for found in steps if found <= step), reverse=True):
        if not folders.damages(steps[found]):
            return steps[found]
    raise CheckpointError(
        f"{run}: has no whole checkpoint of step {step} or before; name another one's path by --checkpoint"
    )


def _whose_weights(result: Replay) -> str:
    behind = result.dump.updates - result.updates
    if behind == 0:
        return "the weights of that step"
    return f"{abs(behind)} updates {'before' if behind > 0 else 'after'} that step: its weights were others"
