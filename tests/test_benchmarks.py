"""The benchmarks run at a tiny size and give a table that makes sense; nothing here judges how fast anything is."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks import machine
from benchmarks.scaling import Seconds, hidden_share
from benchmarks.scaling_model import Links, modelled, modelled_step
from benchmarks.turns import Contender, Run, Turn, result, take_turns
from tests.harness import REPOSITORY, environment, load_config
from trainer.engine.network.build import build_network

TINY = [
    *("--set", "model.image_size=8", "--set", "model.base_channels=8", "--set", "model.channel_multipliers=[1, 2]"),
    *("--set", "model.attention_resolutions=[4]", "--set", "diffusion.timesteps=20"),
    *("--batch", "2", "--threads", "1"),
]
LUCIDRAINS = ["lucidrains"] if importlib.util.find_spec("denoising_diffusion_pytorch") else []
LINKS = Links(node=400e9, network=50e9)


def run_benchmark(name: str, folder: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    out = folder / f"{name}.json"
    command = [sys.executable, f"benchmarks/{name}.py", *arguments, "--json", str(out)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


@pytest.mark.slow
def test_training_steps_of_all_contenders(tmp_path: Path) -> None:
    printed, found = run_benchmark(
        "train_step", tmp_path, *TINY, "--precisions", "fp32", "--steps", "1", "--rounds", "1"
    )
    rows = {row["name"]: row for row in found["rows"]}
    names = ["diffusers example", "diffusers, channels-last", *LUCIDRAINS, "ours", "ours, whole loop"]
    assert list(rows) == [f"{name}, fp32" for name in names]
    assert rows["diffusers example, fp32"]["ratio"] == 1
    for name, row in rows.items():
        assert name in printed
        assert row["per_second"] > 0
        assert 0 < row["of_peak"] < 1
    for name in LUCIDRAINS:
        assert rows[f"{name}, fp32"]["parameters"] != rows["ours, fp32"]["parameters"]


@pytest.mark.slow
def test_a_row_of_ours_with_another_field(tmp_path: Path) -> None:
    also = ("--only", "ours, train", "--also", "train.activation_checkpointing=full")
    _, found = run_benchmark(
        "train_step", tmp_path, *TINY, *also, "--precisions", "bf16", "--steps", "1", "--rounds", "1"
    )
    names = [row["name"] for row in found["rows"]]
    assert names == ["diffusers example, bf16", "ours, train.activation_checkpointing=full, bf16"]


@pytest.mark.slow
def test_sampling_draws_the_same_images(tmp_path: Path) -> None:
    steps = ("--ddpm-steps", "4", "--ddim-steps", "5", "--rounds", "1")
    _, found = run_benchmark("sampling", tmp_path, *TINY, *steps, "--precisions", "fp32", "bf16")
    assert [(row["sampler"], row["name"]) for row in found["rows"]] == [
        (sampler, f"{drawer}, {precision}")
        for sampler in ("ddpm", "ddim")
        for precision in ("fp32", "bf16")
        for drawer in ("diffusers", "ours")
    ]
    for row in found["rows"]:
        assert row["per_second"] > 0
        assert row["largest_difference"] in ([0, 1] if row["name"].endswith("fp32") else [None])


@pytest.mark.slow
def test_ranks_beside_one(tmp_path: Path) -> None:
    arguments = ("--ranks", "1", "2", "--steps", "1", "--rounds", "1", "--nodes", "4")
    _, found = run_benchmark("scaling", tmp_path, *TINY, *arguments)
    one, two = found["rows"]
    assert (one["bytes_per_step"], one["efficiency"]) == (0, 1)
    network = build_network(load_config(REPOSITORY / "configs" / "demo.toml", *TINY[1:8:2]))
    assert two["bytes_per_step"] == 4 * sum(parameter.numel() for parameter in network.parameters())
    assert two["efficiency"] > 0
    assert [row["ranks"] for row in found["model"]] == [8, 16, 32]


@pytest.mark.slow
def test_kernels_by_class(tmp_path: Path) -> None:
    _, found = run_benchmark("kernels", tmp_path, *TINY, "--steps", "1", "--rounds", "1")
    for name in ("diffusers example", "ours"):
        rows = {row["class"]: row for row in found["rows"] if row["name"] == name}
        assert rows.keys() >= {"convolution", "matrix product", "group norm", "activation", "optimizer", "EMA", "all"}
        assert all(row["limit"] > 0 for kind, row in rows.items() if kind in ("convolution", "matrix product", "EMA"))
        assert rows["all"]["seconds"] == pytest.approx(sum(row["seconds"] for row in rows.values()) / 2)


def count_to(images: int) -> Run:
    return lambda: images


def give_up() -> Run:
    raise SystemExit(3)


@pytest.mark.slow
def test_contenders_take_turns() -> None:
    turns = take_turns({"a": Contender(make=count_to, arguments=(3,))}, rounds=2)
    assert [turn.images for turn in turns["a"]] == [3, 3]


def kill_the_benchmark(told: Path) -> Run:
    def run() -> int:
        told.write_text(str(os.getpid()))
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(600)
        return 1

    return run


@pytest.mark.slow
def test_contenders_end_with_a_benchmark_that_is_killed(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    code = (
        "from pathlib import Path; from benchmarks.turns import *; from tests.test_benchmarks import *\n"
        f"take_turns({{'a': Contender(make=kill_the_benchmark, arguments=(Path({str(told)!r}),))}}, rounds=1)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=environment(), timeout=60)
    assert done.returncode == -signal.SIGKILL
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(told.read_text())).wait(timeout=30)


@pytest.mark.slow
def test_a_contender_that_ends_is_named() -> None:
    with pytest.raises(RuntimeError, match="b: ended before its turn"):
        take_turns({"b": Contender(make=give_up, arguments=())}, rounds=1)


@pytest.mark.parametrize(("clock", "expected"), [("cpu", 2.0), ("wall", 4.0)])
def test_a_ratio_is_of_turns_of_one_round(clock: Any, expected: float) -> None:
    own = [Turn(images=10, cpu=1, wall=1), Turn(images=10, cpu=10, wall=10), Turn(images=10, cpu=1, wall=1)]
    reference = [Turn(images=5, cpu=1, wall=2), Turn(images=5, cpu=10, wall=20), Turn(images=5, cpu=9, wall=9)]
    assert result("a", own, reference, clock=clock).ratio == expected


def test_what_a_step_does_not_get_longer_by_is_hidden() -> None:
    assert hidden_share([Seconds(step=1.25, local=1.0, all_reduce=1.0)]) == 0.75
    assert hidden_share([Seconds(step=3.0, local=1.0, all_reduce=1.0)]) == 0
    assert hidden_share([Seconds(step=0.9, local=1.0, all_reduce=1.0)]) == 1


def test_the_model_sends_what_a_ring_sends() -> None:
    """8 ranks of one node: 2 x 7/8 of 400 GB at 400 GB/s; 16 of two nodes: 2 x 15/16 of 400 GB at 50 GB/s."""
    exposed = {
        nodes: modelled_step(1.0, 400e9, nodes=nodes, ranks_per_node=8, links=LINKS, overlap=0.0) - 1
        for nodes in (1, 2)
    }
    assert exposed == pytest.approx({1: 1.75, 2: 15.0})


def test_the_model_hides_no_more_than_the_backward_pass() -> None:
    step = modelled_step(3.0, 400e9, nodes=2, ranks_per_node=8, links=LINKS, overlap=1.0)
    assert step == pytest.approx(3.0 + 15.0 - 2.0)
    rows = modelled(3.0, 1e6, ranks_per_node=8, links=LINKS, overlap=1.0, most_nodes=64)
    assert [row["nodes"] for row in rows] == [1, 2, 4, 8, 16, 32, 64]
    assert all(row["efficiency"] == 1 for row in rows)


@pytest.mark.parametrize(("lacks_bf16", "expected"), [(True, ["fp32"]), (False, ["fp32", "bf16"])])
def test_bf16_is_measured_where_the_device_has_it(
    lacks_bf16: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cpu_lacks_bf16", lambda: lacks_bf16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.usual_precisions() == expected


def test_an_unknown_benchmark_is_named() -> None:
    command = [sys.executable, "-m", "benchmarks", "sampling", "smapling"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert "smapling: no such benchmark" in done.stderr
