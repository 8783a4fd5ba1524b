"""Threads and workers are counted from the cores that are really there."""

import os
from pathlib import Path

import pytest
import torch

from data_prep.cores import available_cores, cpu_quota
from trainer.engine.processes import cpu_share
from trainer.engine.processes.cpu_share import loader_processes, own_cores, threads_asked_for

V2 = "31 23 0:28 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw\n"
V1 = "32 31 0:29 {shown} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"


def machine(root: Path, *, groups: str, mounts: str, files: dict[str, str]) -> tuple[Path, Path]:
    """A /proc/self and a /sys/fs/cgroup to read."""
    proc = root / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text(groups)
    (proc / "mountinfo").write_text("23 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + mounts)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return proc, root


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "100000 100000\n"}, 1.0),  # a container sees its own group as the top
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "50000 100000\n"}, 0.5),
        ({"job/step/cpu.max": "150000 100000\n"}, 1.5),
        ({"job/cpu.max": "200000 100000\n", "job/step/cpu.max": "max 100000\n"}, 2.0),  # a limit lies further up
        ({"job/cpu.max": "200000 100000\n", "job/step/cpu.max": "900000 100000\n"}, 2.0),
        ({"other/cpu.max": "100000 100000\n"}, None),
        ({"cpu.max": ""}, None),
        ({"cpu.max": "garbage\n"}, None),
        ({"cpu.max": "100000 0\n"}, None),
        ({}, None),
    ],
)
def test_the_quota_of_control_groups_v2(files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    proc, root = machine(tmp_path, groups="0::/job/step\n", mounts=V2, files=files)
    assert cpu_quota(proc, root) == quota


@pytest.mark.parametrize(
    ("shown", "folder", "quota", "cores"),
    [
        ("/", "docker/abc/", "150000", 1.5),
        ("/docker/abc", "", "300000", 3.0),  # mounted into the container, whose group is the top there
        ("/", "docker/abc/", "-1", None),
    ],
)
def test_the_quota_of_control_groups_v1(
    shown: str, folder: str, quota: str, cores: float | None, tmp_path: Path
) -> None:
    files = {f"cpu,cpuacct/{folder}cpu.cfs_{name}_us": n for name, n in (("quota", quota), ("period", "100000"))}
    groups = "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n"
    proc, root = machine(tmp_path, groups=groups, mounts=V1.format(shown=shown), files=files)
    assert cpu_quota(proc, root) == cores


def test_a_group_outside_of_what_a_container_sees_has_the_limits_that_are_seen(tmp_path: Path) -> None:
    proc, root = machine(tmp_path, groups="0::/../other\n", mounts=V2, files={"cpu.max": "100000 100000"})
    assert cpu_quota(proc, root) == 1.0
    assert cpu_quota(tmp_path / "no proc", root) is None


@pytest.mark.parametrize(("quota", "cores"), [("150000", 1), ("50000", 1), ("300000", 3), ("900000", 4), ("max", 4)])
def test_cores_are_whole_ones_that_affinity_and_quota_leave(
    quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    proc, root = machine(tmp_path, groups="0::/\n", mounts=V2, files={"cpu.max": f"{quota} 100000"})
    assert available_cores(proc, root) == cores


@pytest.mark.parametrize(
    ("own", "launchers", "command", "threads"),
    [
        ({}, {}, [], None),
        ({"OMP_NUM_THREADS": "1"}, {}, [], 1),  # started by hand
        ({"OMP_NUM_THREADS": "3,2"}, {}, [], 3),
        ({"OMP_NUM_THREADS": "many"}, {}, [], None),
        ({"OMP_NUM_THREADS": "0"}, {}, [], None),
        ({"OMP_NUM_THREADS": "1", "LOCAL_RANK": "0"}, {}, ["torchrun"], None),
        ({"OMP_NUM_THREADS": "1", "LOCAL_RANK": "0"}, {"OMP_NUM_THREADS": "1"}, ["torchrun"], 1),
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, {"HOME": "/"}, ["accelerate", "launch"], None),
        ({"OMP_NUM_THREADS": "32", "ACCELERATE_MIXED_PRECISION": "no"}, {}, ["accelerate", "launch", "--cpu"], None),
        ({"OMP_NUM_THREADS": "1", "LOCAL_RANK": "0"}, {}, ["--num_cpu_threads_per_process", "1"], 1),
        ({"OMP_NUM_THREADS": "6", "LOCAL_RANK": "0"}, {}, ["--num_cpu_threads_per_process=6"], 6),
        ({"OMP_NUM_THREADS": "1", "LOCAL_RANK": "0"}, None, [], None),  # a launcher that cannot be looked at
        ({"OMP_NUM_THREADS": "6", "LOCAL_RANK": "0"}, None, [], 6),
    ],
)
def test_threads_that_the_user_asks_for_are_told_from_a_launchers(
    own: dict[str, str], launchers: dict[str, str] | None, command: list[str], threads: int | None
) -> None:
    assert threads_asked_for(own, launchers, command) == threads


def test_each_process_takes_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_share, "available_cores", lambda: 6)
    monkeypatch.setattr(cpu_share, "_launcher", lambda: ({}, ["torchrun"]))
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert own_cores() == 3
    assert [loader_processes(asked) for asked in (None, 0, 8)] == [3, 0, 8]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    taken: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    for name, value in (("OMP_NUM_THREADS", "2"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
        cpu_share.set_threads()
    assert taken == [2, 3, 1]
    assert loader_processes(None) == 1
