"""--dry-run says what a configuration means, with the paper's numbers, and trains nothing."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.harness import REPOSITORY, checkpoint, launch, load_config, overrides
from trainer.config import Config
from trainer.engine.network.activation_checkpointing import peak_bytes
from trainer.engine.network.cost import Cost, Inputs, cost_of
from trainer.engine.planning import dry_run
from trainer.engine.planning.dry_run import as_text, describe_run
from trainer.engine.planning.estimates import Hardware
from trainer.errors import ConfigError
from trainer.models.stages import ActivationCheckpointing
from trainer.train import parse_arguments


@pytest.fixture
def measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests whose plans are all of one network, which takes most of a plan's time."""
    costs: list[Cost] = []
    peaks: dict[int, int] = {}

    def one_cost(build: Callable[[], nn.Module], inputs: Inputs) -> Cost:
        costs.extend([] if costs else [cost_of(build, inputs)])
        return costs[0]

    def one_peak(config: Config, kinds: list[ActivationCheckpointing], micro_batch: int) -> int:
        if micro_batch not in peaks:
            peaks[micro_batch] = peak_bytes(config, kinds, micro_batch)
        return peaks[micro_batch]

    monkeypatch.setattr(dry_run, "cost_of", one_cost)
    monkeypatch.setattr(dry_run, "peak_bytes", one_peak)


def plan_of(config: Path, *arguments: str, expect: int = 0) -> dict[str, Any]:
    output = launch(1, "--config", str(config), "--dry-run", "--json", *arguments, expect=expect)
    return json.loads(output[: output.rindex("}") + 1])


@pytest.mark.parametrize(
    ("name", "parameters", "forward", "training"),
    [
        ("cifar10", 35_746_307, None, None),
        ("lsun256", 113_673_219, 497.0, 1490.6),
        pytest.param("lsun256_bedroom_large", 255_677_955, None, None, marks=pytest.mark.slow),
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


@pytest.mark.slow
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


@pytest.mark.parametrize("option", [["--json"], ["--device", "h100"], ["--utilisation", "0.5"]])
def test_its_options_go_with_it_alone(
    config_path: Path, option: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "--config", str(config_path), *option])
    with pytest.raises(SystemExit) as ended:
        parse_arguments()
    assert ended.value.code == 2
    assert "--json, --world-size, --device and --utilisation go with --dry-run" in capsys.readouterr().err


def test_how_long_it_would_take_on_a_named_gpu(config_path: Path) -> None:
    """FLOPs over processes x peak x utilisation; with the pictures that are drawn, which are 20 passes forward each."""
    arguments = ["--world-size", "2", "--device", "h100", "--device", "v100", "--utilisation", "0.5"]
    plan = plan_of(config_path, *arguments, *overrides(train__precision="bf16", log__samples_every="2 steps"))
    drawing = 3 * 4 * 20 * plan["forward_flops_per_image"]
    assert plan["flops"] == {
        "training": plan["training_flops"],
        "recomputing": 0,
        "drawing": drawing,
        "measuring": 0,
    }
    shorter = plan_of(config_path, *arguments, *overrides(log__samples_every="2 steps", log__samples_respacing=5))
    assert shorter["flops"]["drawing"] == drawing / 4
    h100, v100 = plan["devices"]
    assert h100["seconds"] == pytest.approx((plan["training_flops"] + drawing) / (989.5e12 * 0.5 * 2))
    assert h100["device_hours"] == pytest.approx(2 * h100["seconds"] / 3600)
    assert (v100["device"], v100["seconds"]) == ("V100", None)  # it does not multiply bfloat16
    text = as_text(plan)
    assert "bf16 at 50% of 989.5 TFLOP/s" in text
    assert "estimate" in text
    assert "2 x V100" in text


def test_recomputing_and_measuring_take_time_too(config_path: Path) -> None:
    recomputed = load_config(config_path, "train.activation_checkpointing=full", "train.strategy=zero3")
    plan, _ = describe_run(recomputed, world_size=1)
    assert plan["flops"]["recomputing"] == 48 * plan["forward_flops_per_image"]
    log = ("log.validate_every=3 steps", "log.distance_every=6 steps", "data.holdout=0.2")
    measured = load_config(config_path, "log.validate_images=5", "log.distance_samples=7", *log)
    plan, _ = describe_run(measured, world_size=1)
    assert plan["flops"]["measuring"] == (2 * 2 * 5 + 1 * 7 * 25) * plan["forward_flops_per_image"]


def test_a_network_too_large_for_a_gpu_is_told(config_path: Path) -> None:
    config = load_config(
        config_path, "model.image_size=128", "model.attention_resolutions=[]", "train.global_batch=512"
    )
    plan, _ = describe_run(config, world_size=1, hardware=Hardware(devices=["T4", "H200"]))
    text = as_text(plan)
    assert [row["fits"] for row in plan["devices"]] == [False, True]
    assert text.count("does not fit into its 16 GB") == 1


@pytest.mark.parametrize(
    ("device", "utilisation", "message"),
    [
        (["h1000"], 0.3, "--device h1000: is not known; known are B200, H200 NVL"),
        (["h100"], 0.0, "--utilisation 0: should be above 0 and at most 1"),
        (["h100"], float("nan"), "--utilisation nan: should be"),
        (["h100"], 30.0, "--utilisation 30: should be"),
    ],
)
def test_hardware_that_cannot_be_is_refused(device: list[str], utilisation: float, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Hardware(devices=device, utilisation=utilisation)


@pytest.mark.usefixtures("measured_once")
def test_bytes_that_a_process_sends_in_a_step(config_path: Path) -> None:
    """In float32 copies of the weights, on four processes that accumulate two micro-batches."""

    def copies(strategy: str, world_size: int = 4, *settings: str) -> float:
        config = load_config(config_path, f"train.strategy={strategy}", "train.micro_batch=1", *settings)
        plan = describe_run(config, world_size=world_size)[0]
        assert plan["accumulation"] == 8 // world_size
        return float(plan["sent_bytes_per_step"] / (4 * plan["parameters"]))

    sent = {strategy: copies(strategy) for strategy in ("ddp", "zero1", "zero2", "zero3", "fsdp2")}
    assert sent == pytest.approx({"ddp": 1.5, "zero1": 1.5, "zero2": 2.25, "zero3": 4.5, "fsdp2": 4.5})
    # groups of two: weights twice and gradients once within, half of the gradients' sum across
    assert copies("hsdp", 4, "train.hsdp_shard_size=2") == pytest.approx(2 * (1.5 + 0.5))
    assert copies("ddp", 1) == 0


def test_snapshots_of_averages_are_counted(config_path: Path) -> None:
    config = load_config(config_path, "train.ema_sigma_rel=[0.05, 0.1]", "train.ema_snapshots=2 steps")
    plan, _ = describe_run(config, world_size=1)
    assert plan["snapshots_bytes"] == 3 * 2 * 4 * plan["parameters"]
    assert plan["disk_bytes"] == 11 * plan["checkpoint_bytes"] + plan["snapshots_bytes"]
    assert "of snapshots" in as_text(plan)


@pytest.mark.usefixtures("measured_once")
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
