"""What is frozen, a network or parameters of one, gets no moments and keeps its bits, under every strategy."""

from pathlib import Path

import pytest
import torch

from tests.adversarial import FREEZE, STRATEGIES, adversarial, changed, made_step, run, saved, take, tensors
from tests.harness import (
    load_config,
    overrides,
    tensors_of,
    write_config,
)
from trainer.engine.build import build_networks, build_state
from trainer.engine.checkpointing.checkpoints import open_verified
from trainer.engine.network.freezing import freeze
from trainer.engine.strategies import DataParallel
from trainer.errors import ConfigError

pytestmark = pytest.mark.usefixtures("adversarial_family")


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
