"""A budget of memory: as few stages as will do compute their activations again, and nothing that is learned changes."""

from pathlib import Path

import pytest
import torch

from tests.harness import assert_same_state, launch, load_config, overrides, write_config
from trainer.config import Config
from trainer.engine.network.activation_checkpointing import peak_bytes, recompute, stage_kinds
from trainer.engine.network.build import build_network
from trainer.engine.planning.dry_run import as_text, describe_run
from trainer.engine.planning.find_batch import find_batch
from trainer.errors import ConfigError
from trainer.models.stages import Stage

BATCH = 8


def peak_of(config: Config, size: int) -> int:
    return peak_bytes(config, stage_kinds(config, size), size)


def with_kind(path: Path, kind: str, *more: str) -> Config:
    return load_config(path, f"train.activation_checkpointing={kind}", *more)


def within(path: Path, budget: int) -> Config:
    return with_kind(path, "budget", f"train.memory_budget={budget}")


def kinds_within(path: Path, budget: int) -> list[str]:
    config = within(path, budget)
    return list(stage_kinds(config, BATCH))


def peak(path: Path, kind: str) -> int:
    return peak_of(with_kind(path, kind), BATCH)


@pytest.mark.slow
def test_no_more_is_recomputed_than_the_budget_asks_for(config_path: Path) -> None:
    nothing, some, all_of_it = (peak(config_path, kind) for kind in ("none", "selective", "full"))
    assert nothing > some > all_of_it
    assert set(kinds_within(config_path, nothing)) == {"none"}
    assert "none" in kinds_within(config_path, nothing - 1)
    assert "selective" in kinds_within(config_path, nothing - 1)
    assert "full" not in kinds_within(config_path, some)
    assert "full" in kinds_within(config_path, some - 1)
    for budget in (nothing - 1, (nothing + some) // 2, (some + all_of_it) // 2, all_of_it):
        assert peak_of(within(config_path, budget), BATCH) <= budget


def test_narrow_stages_come_first(config_path: Path) -> None:
    """They free most memory for the time that they take."""
    budget = (peak(config_path, "none") + peak(config_path, "selective")) // 2
    kinds = kinds_within(config_path, budget)
    with torch.device("meta"):
        stages = [module for module in build_network(load_config(config_path)).modules() if isinstance(module, Stage)]
    sizes = {kind: [s.residual.conv_out.weight.numel() for s, k in zip(stages, kinds) if k == kind] for kind in kinds}
    assert max(sizes["selective"]) <= min(sizes["none"])


@pytest.mark.slow
def test_a_dry_run_tells_how_many(config_path: Path) -> None:
    config = within(config_path, peak(config_path, "none") - 1)
    plan, _ = describe_run(config, world_size=1)
    assert set(plan["blocks"]) == {"none", "selective"}
    some = plan["blocks"]["selective"]
    assert f"all but what takes time of {some} blocks" in as_text(plan)


@pytest.mark.slow
def test_the_search_for_a_micro_batch_ends_where_the_budget_does(config_path: Path) -> None:
    """Each size has what it needs recomputed; the global batch of 8 would not fit even so."""
    budget = peak_of(with_kind(config_path, "full"), 4)
    assert peak_of(with_kind(config_path, "full"), BATCH) > budget
    assert [trial.micro_batch for trial in find_batch(within(config_path, budget))] == [1, 2, 4]


def test_what_cannot_fit_is_refused_with_what_it_takes(config_path: Path) -> None:
    least = peak(config_path, "full")
    with pytest.raises(ConfigError, match=rf"memory_budget: is .* MiB, but a micro-batch of {BATCH} takes .* MiB even"):
        kinds_within(config_path, least // 2)


@pytest.mark.parametrize(
    "settings",
    [
        ["train.activation_checkpointing=budget"],
        ["train.memory_budget=1 GB"],
        ["train.activation_checkpointing=budget", "train.memory_budget=1 GB", "train.strategy=zero3"],
    ],
)
def test_what_does_not_go_together_is_refused(config_path: Path, settings: list[str]) -> None:
    with pytest.raises(ConfigError, match="activation_checkpointing"):
        load_config(config_path, *settings)


@pytest.mark.slow
def test_a_run_within_a_budget_learns_what_it_would_have_without(tmp_path: Path, dataset: Path) -> None:
    config = write_config(tmp_path, dataset, "whole")
    budget = (peak(config, "none") + peak(config, "full")) // 2
    launch(1, "--config", str(config))
    tight = overrides(train__activation_checkpointing="budget", train__memory_budget=budget)
    launch(1, "--config", str(write_config(tmp_path, dataset, "tight")), *tight)
    assert_same_state(tmp_path / "whole", tmp_path / "tight", 6)


def test_every_stage_is_told(config_path: Path) -> None:
    network = build_network(load_config(config_path))
    stages = [module for module in network.modules() if isinstance(module, Stage)]
    recompute(network, ["full", *["selective"] * (len(stages) - 1)])
    assert [stage.activation_checkpointing for stage in stages] == ["full", *["selective"] * (len(stages) - 1)]
