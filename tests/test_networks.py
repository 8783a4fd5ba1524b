"""Networks by name: each with optimizer, averages and counters of its own, under every strategy; frozen ones, and ones
that start from another run's weights.
"""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import two_networks
from tests.faults import Fault
from tests.harness import (
    assert_same_state,
    checkpoint,
    events,
    launch,
    load_config,
    logged,
    overrides,
    tensors_of,
    write_config,
)
from trainer.config import Config
from trainer.data.stream.stream import BatchLayout
from trainer.engine.build import build_network, build_networks, build_state
from trainer.engine.checkpointing.checkpoints import Checkpoints, open_verified, read_verified
from trainer.engine.checkpointing.initial_weights import load_initial_weights
from trainer.engine.network.freezing import freeze
from trainer.engine.step import train_step
from trainer.engine.step.step_report import Verdict
from trainer.engine.step.train_step import TrainStep
from trainer.engine.strategies import DataParallel
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.inspection.replaying import replay
from trainer.signals import StopRequest

ADVERSARIAL = overrides(diffusion__kind="adversarial", model__dropout=0.0)
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")


@pytest.fixture(autouse=True, scope="module")
def family() -> Iterator[None]:
    with two_networks.registered():
        yield


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


@pytest.mark.parametrize("micro_batch", [8, 2])
def test_each_network_is_trained_in_its_phase_on_the_same_batch(tmp_path: Path, micro_batch: int) -> None:
    step = made_step(adversarial(tmp_path, f"train.micro_batch={micro_batch}"))
    before = tensors(step)
    kinds = {"model", "ema", "optimizer.exp_avg", "optimizer.exp_avg_sq"}
    assert {name.partition("/")[0] for name in before} == kinds | {f"critic.{kind}" for kind in kinds}
    taken: list[int] = []
    stream = (taken.append(1) or batch for batch in images(step))  # type: ignore[func-returns-value]
    pending = step.update(step.backward(stream))
    assert len(taken) == 8 // micro_batch
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
    before, calls, original = tensors(step), list[int](), train_step.device_batch

    def spoil(*given: Any) -> Any:
        calls.append(1)
        batch = original(*given)
        return replace(batch, x=batch.x * torch.nan) if len(calls) == phase else batch

    monkeypatch.setattr(train_step, "device_batch", spoil)
    verdict = take(step)
    assert {each.network: each.finite for each in verdict.networks} == {spoilt: False, trained: True}
    kinds = {"model", "ema", "optimizer.exp_avg", "optimizer.exp_avg_sq"}
    prefix = "critic." if trained == "critic" else ""
    assert changed(before, tensors(step)) == {f"{prefix}{kind}" for kind in kinds}
    assert (step.state.networks[spoilt].updates, step.state.networks[trained].updates) == (1, 2)
    assert take(step).finite


def test_what_is_frozen_has_no_moments_and_stays(tmp_path: Path) -> None:
    step = made_step(adversarial(tmp_path, 'train.freeze=["down.*", "critic.conv.*"]'))
    before = tensors(step)
    for _ in range(4):  # the network's last layer starts as zeros, so others hardly move in the first step
        take(step)
    after = tensors(step)
    moments = {name.partition("/")[2] for name in after if name.startswith("optimizer.exp_avg/")}
    assert moments == {name for name in step.state.main.shapes if not name.startswith("down.")}
    assert {name for name in after if name.startswith("critic.optimizer.exp_avg/")} == {
        f"critic.optimizer.exp_avg/dense.{kind}" for kind in ("weight", "bias")
    }
    assert after.keys() == step.state.contents().shapes.keys()
    stayed = {name for name, value in before.items() if torch.equal(value, after[name])}
    frozen = {f"{kind}/{name}" for kind in ("model", "ema") for name in step.state.main.shapes if name[:5] == "down."}
    assert stayed == frozen | {f"{k}/conv.{n}" for k in ("critic.model", "critic.ema") for n in ("weight", "bias")}


def test_a_network_that_is_frozen_as_a_whole_has_no_phase(tmp_path: Path) -> None:
    step = made_step(adversarial(tmp_path, 'train.freeze=["critic"]'))
    before = tensors(step)
    assert [each.network for each in take(step).networks] == ["model"]
    assert all(not kind.startswith("critic.") for kind in changed(before, tensors(step)))


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["critc"], "train.freeze: 'critc' names no network and no parameter; the nearest is critic"),
        (["*"], "train.freeze: freezes everything, so there is nothing to train"),
        (["model", "critic.*"], "train.freeze: freezes everything"),
    ],
)
def test_freezing_nothing_or_everything_is_refused(tmp_path: Path, patterns: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("*", r"\*")):
        freeze(build_networks(adversarial(tmp_path)), patterns)


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
    fault = Fault(action="nan", point="device_batch", call=6, rank=1)
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
    run(2, config, fault=Fault(action="nan", point="device_batch", call=2, rank=1))
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


FREEZE = 'train.freeze=["down.*", "critic.conv.*"]'


@pytest.mark.parametrize(
    "strategy", ["ddp", *(pytest.param(strategy, marks=pytest.mark.slow) for strategy in STRATEGIES[1:])]
)
@pytest.mark.parametrize("freeze", [FREEZE, pytest.param('train.freeze=["model"]', marks=pytest.mark.slow)])
def test_frozen_weights_are_the_same_bits_at_the_end(tmp_path: Path, dataset: Path, strategy: str, freeze: str) -> None:
    """Saved and resumed on two ranks, and from one rank's checkpoint."""
    config = write_config(tmp_path, dataset)
    settings = ["--set", freeze, *overrides(train__strategy=strategy)]
    run(1, config, "--set", freeze, *overrides(train__duration="2 steps"))
    run(2, config, *settings)
    start = build_state(load_config(tmp_path / "run" / "config.toml", "train.strategy=ddp"), _ddp(config))
    initial = {piece.name: piece.values for piece in start.contents().slices}
    end = tensors_of(tmp_path / "run", 6)
    assert end.keys() == initial.keys()
    frozen = {name for name in end if is_frozen(name, freeze)}
    assert frozen
    assert {name for name in end if torch.equal(end[name], initial[name])} == frozen


def is_frozen(name: str, freeze: str) -> bool:
    if "model" in freeze:
        return name.startswith(("model/", "ema/"))
    return name.startswith(("model/down.", "ema/down.", "critic.model/conv.", "critic.ema/conv."))


def _ddp(config: Path) -> DataParallel:
    return DataParallel(load_config(config).train)


def test_what_is_frozen_stays_so_for_the_run(tmp_path: Path, dataset: Path) -> None:
    config = write_config(tmp_path, dataset)
    run(1, config, "--set", FREEZE, *overrides(train__duration="2 steps"))
    output = run(1, config, expect=2)
    assert "train.freeze: ['down.*', 'critic.conv.*'] in the checkpoint, [] now" in output


def test_imported_weights_may_be_frozen_later(tmp_path: Path) -> None:
    """Their checkpoint has moments of everything."""
    reader, manifest = open_verified(saved(tmp_path))
    state = made_step(adversarial(tmp_path, FREEZE)).state
    assert state.load(reader, manifest["state"]) == []
    assert "optimizer.exp_avg/down.0.residual.conv_in.weight" not in state.contents().shapes


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_every_strategy_computes_with_the_weights_that_it_started_from(
    tmp_path: Path, dataset: Path, strategy: str
) -> None:
    """Frozen ones too."""
    run(1, write_config(tmp_path, dataset, "first"))
    sources = overrides(train__init_from__model=tmp_path / "first", train__init_from__critic=tmp_path / "first")
    sources[1], sources[3] = f"{sources[1]}:ema", f"{sources[3]}:critic.model"
    for name, ranks in (("ddp", 1), (strategy, 2)):
        config = write_config(tmp_path, dataset, name)
        run(ranks, config, *sources, "--set", FREEZE, *overrides(train__strategy=name))
    for loss in ("train/loss", "train/critic/loss"):
        assert logged(tmp_path / strategy, loss) == pytest.approx(logged(tmp_path / "ddp", loss), rel=1e-4)


def test_networks_start_from_another_runs_weights(tmp_path: Path, dataset: Path) -> None:
    run(1, write_config(tmp_path, dataset, "first"))
    first = tensors_of(tmp_path / "first", 6)
    config = write_config(tmp_path, dataset, "second")
    step = checkpoint(tmp_path / "first", 6)
    sources = overrides(
        train__init_from__model=f"{tmp_path / 'first'}:ema", train__init_from__critic=f"{step}:critic.model"
    )
    # In step 0 the learning rate is 0: the weights are those that it started from.
    one = overrides(train__duration="1 steps")
    output = run(2, config, *sources, *one)
    assert f"critic: starts from critic.model of {step}" in output
    second = tensors_of(tmp_path / "second", 1)
    for kind, source in (("model", "ema"), ("critic.model", "critic.model")):
        names = [name.partition("/")[2] for name in first if name.startswith(f"{kind}/")]
        assert all(torch.equal(second[f"{kind}/{name}"], first[f"{source}/{name}"]) for name in names)

    refused = run(1, config, *overrides(train__init_from__model=str(tmp_path / "first")), expect=2)
    assert "train.init_from: {'model':" in refused
    assert "in the checkpoint" in refused
    shutil.rmtree(tmp_path / "first")  # a run that goes on does not read it again
    run(1, config, *sources)
    assert [event["step"] for event in events(tmp_path / "second") if event["event"] == "started"] == [0, 1]


def saved(folder: Path, *settings: str, spoil: str | None = None) -> Path:
    """A checkpoint of step 0; of the parameter `spoil` one value is not a number."""
    state = made_step(adversarial(folder, *settings)).state
    for piece in state.main.network.slices:
        if piece.name == spoil:
            piece.weight.view(-1)[-1] = torch.nan
    return Checkpoints(folder / "checkpoints", state.strategy.accelerator).save(state.contents(), step=0, identity={})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere:ema", "train.init_from.model = nowhere:ema: no such run or checkpoint"),
        ("SAVED:ema-0.1", "has no weights 'ema-0.1', but critic.ema, critic.model, ema, model"),
        ("SAVED:critic.model", r"critic.model/conv.weight: of no layer of the network 'model'"),
        ("DEEP", r"model/down.1.residual.norm_in.weight: of no layer of the network 'model'"),
        ("PLAIN", r"model/down.2.attention.norm.weight: missing; the network 'model' has it"),
        ("WIDE", r"model/temb.dense_in.weight: shape \(.*\), the network 'model' has \(.*\)"),
        ("NAN", "model/conv_in.bias: holds what is no finite floating point number"),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path: Path, source: str, message: str) -> None:
    where, separator, kind = source.partition(":")
    if where != "nowhere":
        others = {"WIDE": "base_channels=16", "DEEP": "blocks_per_level=2", "PLAIN": "attention_resolutions=[]"}
        settings = [f"model.{others[where]}"] if where in others else []
        where = str(saved(tmp_path, *settings, spoil="conv_in.bias" if where == "NAN" else None))
    config = adversarial(tmp_path, f"train.init_from.model={where}{separator}{kind}")
    with pytest.raises(CheckpointError, match=message) as refused:
        load_initial_weights(config, made_step(config).state, say=print)
    assert "\n" not in str(refused.value)


def test_a_damaged_checkpoint_is_none_to_start_from(tmp_path: Path) -> None:
    path = saved(tmp_path)
    part = next(path.glob("part-*"))
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    config = adversarial(tmp_path, f"train.init_from.model={path}")
    with pytest.raises(CheckpointError, match="damaged"):
        load_initial_weights(config, made_step(config).state, say=print)


def test_a_network_that_the_run_does_not_have_starts_from_nothing(tmp_path: Path, dataset: Path) -> None:
    output = run(1, write_config(tmp_path, dataset), *overrides(train__init_from__crtic="nowhere"), expect=2)
    assert "train.init_from.crtic: this run has no such network, but model, critic" in output
