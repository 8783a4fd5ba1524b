"""The state of a run: saved and loaded it goes on as if nothing had been; averages are what the papers define."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ema_pytorch import EMA, KarrasEMA
from torch import nn

from tests.harness import read_verified, unet_section
from trainer.config import Config, DDPMUNetConfig
from trainer.engine.build import build_objective
from trainer.engine.checkpointing.checkpoints import Checkpoints, open_verified
from trainer.engine.state.ema import Averages, Decay, constant, power_function, warm_up
from trainer.engine.state.tensor_files import TensorReader
from trainer.engine.state.train_state import TrainState
from trainer.engine.strategies import DataParallel
from trainer.engine.strategies.optimizer import GuardedAdam
from trainer.engine.strategies.parameter_slices import ParameterSlice, owned
from trainer.errors import CheckpointError
from trainer.models.ddpm_unet import UNet

MODEL = unet_section(
    image_size=8,
    base_channels=8,
    channel_multipliers=[1, 2],
    blocks_per_level=1,
    attention_resolutions=[4],
    dropout=0.0,
    norm_groups=4,
)


def make_optimizer(network: nn.Module) -> GuardedAdam:
    return GuardedAdam(network.parameters(), learning_rate=1e-3, betas=(0.9, 0.999), eps=1e-8, clip_norm=1.0)


def small_state(config_path: Path, model: DDPMUNetConfig = MODEL, **decays: Decay) -> TrainState:
    config = Config.load(config_path)
    strategy = DataParallel(config.train)
    torch.manual_seed(1)
    network = strategy.prepare(UNet(model, 3), make_optimizer)
    objective = build_objective(config, strategy.device)
    return TrainState(strategy, {"model": network}, {"ema": constant(0.9), **decays}, objective)


def take_a_step(state: TrainState, seed: int = 0) -> None:
    torch.manual_seed(seed)
    state.main.network.module.eval()
    x = torch.randn(2, 3, 8, 8)
    loss = (state.main.network.module(x, torch.tensor([3, 5])) - x).square().mean()
    state.main.network.backward(loss)
    state.main.network.optimizer.prepare_step(learning_rate=1e-3, loss=loss.detach())
    state.main.network.step()
    state.main.updated()


def save(state: TrainState, folder: Path, step: int) -> Path:
    return Checkpoints(folder, state.strategy.accelerator).save(state.contents(), step=step, identity={})


def test_a_loaded_state_goes_on_like_the_saved_one(tmp_path: Path, config_path: Path) -> None:
    state, loaded = small_state(config_path), small_state(config_path)
    take_a_step(state)
    reader, manifest = open_verified(save(state, tmp_path, 1))
    loaded.load(reader, manifest["state"])
    for each in (state, loaded):
        take_a_step(each, seed=1)
    ours, theirs = (read_verified(save(each, tmp_path / "again", n))[0] for n, each in enumerate((state, loaded)))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    conv = next(piece for piece in loaded.main.network.slices if piece.name == "conv_in.weight")
    moments = loaded.main.network.optimizer.state[conv.storage]
    assert moments["exp_avg"].is_contiguous(memory_format=torch.channels_last)  # as the fused optimizer needs it


def test_a_state_of_another_network_is_refused(tmp_path: Path, config_path: Path) -> None:
    path = save(small_state(config_path), tmp_path, 0)
    reader, manifest = open_verified(path)

    def without(name: str) -> TensorReader:
        reader, _ = open_verified(path)
        del reader.shapes[name]
        return reader

    with pytest.raises(CheckpointError, match=r"model/.*: shape \(.*, the network has \("):
        small_state(config_path, MODEL.model_copy(update={"base_channels": 16})).load(reader, manifest["state"])
    with pytest.raises(CheckpointError, match=r"ema/conv_in\.bias: missing"):
        small_state(config_path).load(without("ema/conv_in.bias"), manifest["state"])
    with pytest.raises(CheckpointError, match=r"optimizer\.exp_avg/conv_in\.bias: missing"):
        small_state(config_path).load(without("optimizer.exp_avg/conv_in.bias"), manifest["state"])
    with pytest.raises(CheckpointError, match="the checkpoint is of another run"):
        small_state(config_path, MODEL.model_copy(update={"blocks_per_level": 2})).load(reader, manifest["state"])


def test_averages_may_come_and_go_between_restarts(tmp_path: Path, config_path: Path) -> None:
    state = small_state(config_path, **{"ema-0.1": power_function(0.1)})
    take_a_step(state)
    reader, manifest = open_verified(save(state, tmp_path, 1))
    other = small_state(config_path, **{"ema-0.2": power_function(0.2)})
    came, went = other.load(reader, manifest["state"])
    assert "ema-0.2: the checkpoint has no such average; it starts as the checkpoint's ema" in came
    assert "ema-0.1: train.ema_sigma_rel asks for no such average any more" in went
    started, main = other.main.average("ema-0.2"), state.main.average("ema")
    assert all(torch.equal(value, main[name]) for name, value in started.items())


def gamma_of(sigma_rel: float) -> float:
    """Karras et al. 2024: sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), by bisection."""
    low, high = 0.0, 1000.0
    for _ in range(80):
        gamma = (low + high) / 2
        wide = (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) > sigma_rel**2
        low, high = (gamma, high) if wide else (low, gamma)
    assert sigma_rel != 0.10 or round(gamma, 2) == 6.94  # the paper's
    return gamma


DECAYS: dict[str, tuple[Decay, Callable[[int], float]]] = {
    "constant": (constant(0.9), lambda _: 0.9),
    "warm-up": (warm_up(0.95), lambda n: min(0.95, 1 - (1 + n) ** (-2 / 3))),
    "power": (power_function(0.10), lambda n: (1 - 1 / n) ** (gamma_of(0.10) + 1)),
}


@pytest.mark.parametrize("name", DECAYS)
def test_an_average_is_what_float64_by_hand_says(name: str) -> None:
    decay, by_hand = DECAYS[name]
    weights = torch.zeros(7, 3)
    average = Averages([whole("w", weights)], {"ema": decay})
    expected = weights.double().clone()
    generator = torch.Generator().manual_seed(0)
    for n in range(1, 60):
        weights.copy_(torch.randn(7, 3, generator=generator))
        average.update(n)
        expected = by_hand(n) * expected + (1 - by_hand(n)) * weights.double()
    torch.testing.assert_close(average.by_name["ema"].values[0].double(), expected, rtol=0, atol=1e-5)


def test_schedules_are_those_of_ema_pytorch() -> None:
    network = nn.Linear(1, 1)
    theirs = EMA(network, beta=0.999, update_after_step=-1, update_every=1)
    ours = warm_up(0.999)
    for n in range(1, 50):
        theirs.step.fill_(n)
        assert ours(n) == pytest.approx(theirs.get_current_decay(), abs=1e-6)
    karras, power = KarrasEMA(network, sigma_rel=0.05), power_function(0.05)
    for n in range(1, 50):
        karras.step.fill_(n - 1)
        assert power(n) == pytest.approx(float(karras.beta), rel=1e-6)


def whole(name: str, tensor: torch.Tensor) -> ParameterSlice:
    return ParameterSlice(name=name, shape=tensor.shape, start=0, stop=tensor.numel(), storage=tensor)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_an_average_in_uneven_parts_is_the_whole_one(parts: int) -> None:
    """What each rank would average of a flat partition, put together, is bit for bit the average of the whole."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(10, 5, generator=generator)
    flat = weights.view(-1)
    bounds = [round(i * 50 / parts) for i in range(parts)] + [50]
    ranks = [
        ParameterSlice(name="w", shape=weights.shape, start=a, stop=b, storage=flat, offset=a)
        for a, b in itertools.pairwise(bounds)
    ]
    sharded = [Averages([piece], {"ema": constant(0.7)}) for piece in ranks]
    unsharded = Averages([whole("w", weights)], {"ema": constant(0.7)})
    for n in range(1, 10):
        weights.copy_(torch.randn(10, 5, generator=generator))
        for average in [*sharded, unsharded]:
            average.update(n)
    together = torch.cat([average.by_name["ema"].values[0] for average in sharded])
    assert torch.equal(together, unsharded.by_name["ema"].values[0].view(-1))


def test_a_step_with_a_loss_that_is_not_finite_changes_nothing(config_path: Path) -> None:
    state = small_state(config_path)
    before = {piece.name: piece.weight.clone() for piece in state.main.network.slices}
    x = torch.randn(2, 3, 8, 8)
    state.main.network.backward(state.main.network.module(x, torch.tensor([3, 5])).square().mean())
    state.main.network.optimizer.prepare_step(learning_rate=1.0, loss=torch.tensor(torch.nan))
    state.main.network.step()
    assert state.main.network.optimizer.skipped == 1
    assert all(torch.equal(before[piece.name], piece.weight) for piece in state.main.network.slices)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(config_path: Path, value: float) -> None:
    """The loss is finite: a backward pass may overflow by itself."""
    state = small_state(config_path)
    before = {piece.name: piece.weight.clone() for piece in state.main.network.slices}
    x = torch.randn(2, 3, 8, 8)
    state.main.network.backward(state.main.network.module(x, torch.tensor([3, 5])).square().mean())
    gradient = state.main.network.slices[0].storage.grad
    assert gradient is not None
    gradient.view(-1)[0] = value
    state.main.network.optimizer.prepare_step(learning_rate=1.0, loss=torch.tensor(1.0))
    state.main.network.step()
    assert state.main.network.optimizer.skipped == 1
    assert all(torch.equal(before[piece.name], piece.weight) for piece in state.main.network.slices)


def test_one_process_owns_all() -> None:
    slices = [whole(name, torch.zeros(n)) for n, name in enumerate("abc", start=1)]
    assert owned(slices) == slices
