"""Networks that start from another run's weights, raw or averaged, each from its own."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.adversarial import (
    FREEZE,
    STRATEGIES,
    adversarial,
    made_step,
    run,
    saved,
)
from tests.harness import (
    checkpoint,
    events,
    logged,
    overrides,
    tensors_of,
    write_config,
)
from trainer.engine.checkpointing.initial_weights import load_initial_weights
from trainer.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("adversarial_family")


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
