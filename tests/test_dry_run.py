"""--dry-run says what a configuration means, with the paper's numbers, and trains nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.harness import REPOSITORY, checkpoint, launch, load_config, overrides
from trainer.engine.dry_run import as_text, describe_run


def plan_of(config: Path, *arguments: str, expect: int = 0) -> dict[str, Any]:
    output = launch(1, "--config", str(config), "--dry-run", "--json", *arguments, expect=expect)
    return json.loads(output[: output.rindex("}") + 1])


@pytest.mark.parametrize(
    ("name", "parameters", "forward", "training"),
    [
        ("cifar10", 35_746_307, None, None),
        ("lsun256", 113_673_219, 497.0, 1490.6),
        ("lsun256_bedroom_large", 255_677_955, None, None),
    ],
)
def test_the_papers_networks(name: str, parameters: int, forward: float | None, training: float | None) -> None:
    """The data is not there, which is said, and the exit code tells; the rest is printed all the same."""
    plan = plan_of(REPOSITORY / "configs" / f"{name}.toml", *overrides(data__path="/nowhere"), expect=2)
    assert plan["parameters"] == parameters
    assert plan["checkpoint_bytes"] == 16 * parameters
    assert "/nowhere: no such folder" in plan["dataset"]["fault"]
    if forward is not None:
        assert round(plan["forward_flops_per_image"] / 1e9, 1) == forward
        assert round(plan["training_flops_per_image"] / 1e9, 1) == training


def test_arithmetic_of_processes_steps_and_disk(config_path: Path) -> None:
    plan = plan_of(config_path, "--world-size", "2", *overrides(train__micro_batch=2, train__duration="50 images"))
    assert (plan["world_size"], plan["accumulation"], plan["micro_batch"], plan["global_batch"]) == (2, 2, 2, 8)
    assert (plan["steps"], plan["images"]) == (7, 56)  # the last step is whole
    assert plan["epochs"] == pytest.approx(56 / 21)
    assert plan["training_flops"] == 56 * plan["training_flops_per_image"]
    assert plan["disk_bytes"] == 11 * plan["checkpoint_bytes"]  # keep = 10, and the one being written
    assert plan["dataset"] == {"path": plan["dataset"]["path"], "samples": 21, "shards": 3, "fault": None}
    assert not (config_path.parent / "run").exists()


def test_the_checkpoint_has_the_size_that_was_foretold(config_path: Path) -> None:
    plan, _ = describe_run(load_config(config_path), world_size=1)
    launch(1, "--config", str(config_path))
    folder = checkpoint(config_path.parent / "run", 6)
    tensors = json.loads((folder / "manifest.json").read_text())["tensors"]
    assert sum(path.stat().st_size for path in folder.glob("part-*")) == pytest.approx(
        plan["checkpoint_bytes"], abs=200 * len(tensors)
    )


def test_memory_grows_with_the_batch_and_shrinks_with_checkpointing(config_path: Path) -> None:
    """Without activations it is five copies of the weights: weights, gradients, two moments, EMA."""

    def memory(*settings: str) -> int:
        config = load_config(config_path, "model.image_size=32", "model.attention_resolutions=[]", *settings)
        return int(describe_run(config, world_size=1)[0]["memory_per_device_bytes"])

    one, two, three = (memory(f"train.micro_batch={n}", "train.global_batch=12") for n in (1, 2, 3))
    parameters = describe_run(load_config(config_path), world_size=1)[0]["parameters"]
    assert one > 20 * parameters
    assert two - one == pytest.approx(three - two, rel=0.1)
    none, selective, full = (
        memory(f"train.activation_checkpointing={kind}", "train.global_batch=12")
        for kind in ("none", "selective", "full")
    )
    assert full < selective < 0.9 * none
    assert full < 0.7 * none


def test_damaged_shards_are_found(config_path: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(load_config(config_path).data.path, copy)
    (copy / "shard-000002.tar").unlink()
    plan, fault = describe_run(load_config(config_path, f"data.path={copy}"), world_size=1)
    assert "shard-000002.tar: missing; the manifest lists 3 shards" in str(fault)
    assert "shard-000002.tar: missing" in as_text(plan)


def test_its_options_go_with_it_alone(config_path: Path) -> None:
    output = launch(1, "--config", str(config_path), "--json", expect=2)
    assert "--json and --world-size go with --dry-run" in output


def test_sharing_takes_less_of_each_device(config_path: Path) -> None:
    """On four processes, in float32 copies of the weights, beside the activations."""

    def copies(strategy: str, *settings: str) -> float:
        config = load_config(config_path, f"train.strategy={strategy}", "train.micro_batch=1", *settings)
        plan = describe_run(config, world_size=4)[0]
        return float(plan["memory_per_device_bytes"] / (4 * plan["parameters"]))

    ddp = copies("ddp")
    saved = {strategy: ddp - copies(strategy) for strategy in ("zero1", "zero2", "zero3", "fsdp2")}
    # moments 2 -> 1/2, a master copy + 1/4; gradients 1 -> 1/4; weights 1 -> 1/4 and no master copy
    assert saved == pytest.approx({"zero1": 1.25, "zero2": 2.0, "zero3": 3.0, "fsdp2": 3.0}, abs=1e-3)
    assert ddp - copies("hsdp", "train.hsdp_shard_size=2") == pytest.approx(2.0, abs=1e-3)
    assert copies("zero2") - copies("zero2", "train.offload_optimizer=true") == pytest.approx(1.0, abs=1e-3)
    assert copies("ddp", "train.ema_sigma_rel=[0.05, 0.1]") - ddp == pytest.approx(0.5, abs=1e-3)
