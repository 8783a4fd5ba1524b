"""Networks by name: each is trained in its phase, with optimizer, averages and counters of its own."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adversarial import (
    STRATEGIES,
    adversarial,
    changed,
    images,
    made_step,
    run,
    take,
    tensors,
)
from tests.faults import Fault
from tests.harness import (
    assert_same_state,
    checkpoint,
    logged,
    overrides,
    read_verified,
    write_config,
)
from trainer.config import Config
from trainer.engine.build import build_networks
from trainer.engine.network.build import build_network
from trainer.engine.step import train_step
from trainer.engine.step.phase_step import PhaseStep
from trainer.errors import ConfigError, DataError
from trainer.inspection.replaying import replay

pytestmark = pytest.mark.usefixtures("adversarial_family")


@pytest.mark.parametrize("micro_batch", [8, 2])
def test_each_network_is_trained_in_its_phase_on_the_same_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch: int
) -> None:
    """Which is moved to the device once."""
    moved, move = list[int](), train_step.device_batch
    monkeypatch.setattr(train_step, "device_batch", lambda *given: moved.append(1) or move(*given))  # type: ignore[func-returns-value]
    step = made_step(adversarial(tmp_path, f"train.micro_batch={micro_batch}"))
    before = tensors(step)
    kinds = {"model", "ema", "optimizer.exp_avg", "optimizer.exp_avg_sq"}
    assert {name.partition("/")[0] for name in before} == kinds | {f"critic.{kind}" for kind in kinds}
    taken: list[int] = []
    stream = (taken.append(1) or batch for batch in images(step))  # type: ignore[func-returns-value]
    pending = step.update(step.backward(stream))
    assert len(taken) == len(moved) == 8 // micro_batch
    verdict = pending.read()
    assert [each.network for each in verdict.networks] == ["model", "critic"]
    assert changed(before, tensors(step)) == (kinds | {f"critic.{kind}" for kind in kinds}) - {"ema", "critic.ema"}
    assert step.state.position == 8


def test_every_phase_accumulates_over_the_whole_global_batch(tmp_path: Path) -> None:
    whole, accumulated = (take(made_step(adversarial(tmp_path, f"train.micro_batch={size}"))) for size in (8, 2))
    for one, other in zip(whole.networks, accumulated.networks, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)


def test_a_phase_gives_gradients_to_its_own_network_alone(tmp_path: Path) -> None:
    step = made_step(adversarial(tmp_path))
    step.backward(images(step))
    model, critic = (each.network.module for each in step.state.networks.values())
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in critic.parameters())
    assert all(parameter.requires_grad for parameter in critic.parameters())


def test_a_further_network_leaves_the_first_ones_weights_as_they_start(tmp_path: Path) -> None:
    config = adversarial(tmp_path)
    torch.manual_seed(config.seed)
    alone = build_network(config).state_dict()
    torch.manual_seed(config.seed)
    together = build_networks(config)["model"].state_dict()
    assert all(torch.equal(alone[name], together[name]) for name in alone)


@pytest.mark.parametrize(("phase", "spoilt", "trained"), [(1, "model", "critic"), (2, "critic", "model")])
def test_a_phase_that_is_not_finite_leaves_its_own_network_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: int, spoilt: str, trained: str
) -> None:
    step = made_step(adversarial(tmp_path))
    take(step)
    before, calls, original = tensors(step), list[int](), PhaseStep._compute

    def spoil(*given: Any) -> Any:
        calls.append(1)
        losses = original(*given)
        return replace(losses, loss=losses.loss * torch.nan) if len(calls) == phase else losses

    monkeypatch.setattr(PhaseStep, "_compute", spoil)
    verdict = take(step)
    assert {each.network: each.finite for each in verdict.networks} == {spoilt: False, trained: True}
    kinds = {"model", "ema", "optimizer.exp_avg", "optimizer.exp_avg_sq"}
    prefix = "critic." if trained == "critic" else ""
    assert changed(before, tensors(step)) == {f"{prefix}{kind}" for kind in kinds}
    assert (step.state.networks[spoilt].updates, step.state.networks[trained].updates) == (1, 2)
    assert all(each.finite for each in take(step).networks)


def test_a_network_may_have_an_optimizer_of_its_own(tmp_path: Path) -> None:
    """What its table leaves out is as for all, also when the resolved configuration is read again."""
    own = ["optimizer.networks.critic.learning_rate=0.5", "optimizer.networks.critic.betas=[0.5, 0.9]"]
    config = adversarial(tmp_path, *own, "optimizer.clip_norm=7.0")
    (tmp_path / "resolved.toml").write_text(config.to_toml())
    for each in (config, Config.load(tmp_path / "resolved.toml")):
        step = made_step(each)
        take(step)
        model, critic = (network.network.optimizer for network in step.state.networks.values())
        assert [model.clip_norm, critic.clip_norm] == [7.0, 7.0]
        assert [model.param_groups[0]["betas"], critic.param_groups[0]["betas"]] == [(0.9, 0.999), (0.5, 0.9)]
        assert [network.learning_rate for network in step.state.networks.values()] == [1e-3, 0.5]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("critic.lerning_rate=1", "optimizer.networks.critic.lerning_rate: unknown key; did you mean learning_rate"),
        ("critic.eps=-1.0", "optimizer.networks.critic.eps = -1.0: should be greater than 0"),
        ("critic=3", "optimizer.networks.critic = 3: should be a section"),
    ],
)
def test_faults_in_a_networks_optimizer_are_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adversarial(tmp_path, f"optimizer.networks.{override}")


def test_settings_of_a_network_that_is_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"optimizer\.networks\.crtic: this run has no such network, but model, critic"
    ):
        made_step(adversarial(tmp_path, "optimizer.networks.crtic.eps=1e-6"))


def test_two_networks_resume_to_the_bit_on_two_ranks(tmp_path: Path, dataset: Path) -> None:
    """A critic's phase that is not finite on one rank, in step 3, skips the critic on both."""
    warm_up = 2  # passes, one a phase
    fault = Fault(action="nan", point="phase", call=warm_up + 6, rank=1)
    config, whole = write_config(tmp_path, dataset), tmp_path / "whole"
    path = tmp_path / "run"
    run(2, config, fault=fault)
    state = read_verified(checkpoint(path, 6))[1]["state"]
    assert (state["updates"], state["networks"]["critic"]["updates"], state["nonfinite_steps"]) == (6, 5, 1)
    assert sorted(logged(path, "train/critic/loss")) == [1, 2, 4, 5, 6]
    assert sorted(logged(path)) == [1, 2, 3, 4, 5, 6]
    dump = path / "nonfinite" / "step-00000003.json"
    with pytest.raises(DataError, match="of the network 'critic'; only steps of 'model' can be computed again"):
        replay(dump, checkpoint=None, device=torch.device("cpu"))
    shutil.copytree(path, whole)
    for step in (4, 6):
        shutil.rmtree(checkpoint(path, step))
    run(2, config, fault=Fault(action="nan", point="phase", call=warm_up + 2, rank=1))
    assert_same_state(whole, path, 6)
    assert logged(whole, "train/critic/loss") == logged(path, "train/critic/loss")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_networks_train_alike_under_every_strategy(tmp_path: Path, dataset: Path, strategy: str) -> None:
    """Accumulating two micro-batches, and half way from another's checkpoint; then again, to the bit."""
    one = write_config(tmp_path, dataset, "one")
    run(1, one)
    spread = overrides(train__strategy=strategy, train__micro_batch=2)
    for name, first, second in (("spread", 2, 2), ("fewer", 2, 1), ("from-ddp", 1, 2)):
        config = write_config(tmp_path, dataset, name)
        start = overrides(train__duration="2 steps")
        run(first, config, *(spread if name != "from-ddp" else []), *start)
        run(second, config, *(spread if name != "fewer" else []))
        for loss in ("train/loss", "train/critic/loss", "train/critic/grad_norm"):
            assert logged(tmp_path / name, loss) == pytest.approx(logged(tmp_path / "one", loss), rel=1e-4), loss
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "spread", again)
    shutil.rmtree(checkpoint(tmp_path / "spread", 6))
    run(2, tmp_path / "spread.toml", *spread)
    assert_same_state(again, tmp_path / "spread", 6)


CHAIN = [("ddp", 1), ("zero2", 2), ("fsdp2", 2), ("zero3", 1), ("zero1", 2), ("fsdp2", 1), ("ddp", 2)]


@pytest.mark.slow
def test_two_networks_may_change_strategy_and_ranks_at_every_restart(tmp_path: Path, dataset: Path) -> None:
    duration = overrides(train__duration=f"{2 * len(CHAIN)} steps")
    run(1, write_config(tmp_path, dataset, "one"), *duration)
    config = write_config(tmp_path, dataset, "chain")
    for leg, (strategy, ranks) in enumerate(CHAIN, start=1):
        run(ranks, config, *overrides(train__strategy=strategy, train__duration=f"{2 * leg} steps"))
    for loss in ("train/loss", "train/critic/loss"):
        assert logged(tmp_path / "chain", loss) == pytest.approx(logged(tmp_path / "one", loss), rel=1e-4)
