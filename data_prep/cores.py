"""How many cores this process may really use: its affinity, and the quota that a container or a job was given."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

_MOST = 10**6  # cores; what a file says beyond that is no quota


def available_cores(proc: Path = Path("/proc/self"), root: Path = Path("/")) -> int:
    """Whole cores that this process can keep busy, at least 1.

    A quota of 1.5 cores counts as 1: with two busy threads the kernel would hold up both for half of the time.
    `proc` and `root` as for `cpu_quota`.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, math.floor(cpu_quota(proc, root) or allowed)))


def cpu_quota(proc: Path = Path("/proc/self"), root: Path = Path("/")) -> float | None:
    """Cores' worth of time that the control groups (v1 or v2) around this process grant it; None without a limit.

    `proc`: the process's folder in /proc; `root`: what mount points are relative to. What cannot be read is no limit.
    """
    quotas = [quota for folder in _cpu_groups(proc, root) if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def _cpu_groups(proc: Path, root: Path) -> Iterator[Path]:
    """The folders of the process's groups that may limit its time, and of all groups around them that can be seen."""
    try:
        memberships = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines()]
        mounts = [line.split(" ") for line in (proc / "mountinfo").read_text().splitlines()]
    except (OSError, UnicodeDecodeError):
        return
    for mount in mounts:
        try:
            shown, point = mount[3], mount[4]
            kind, _, options = mount[mount.index("-") + 1 :][:3]
        except (IndexError, ValueError):
            continue
        if kind != "cgroup2" and (kind != "cgroup" or "cpu" not in options.split(",")):
            continue
        for _, controllers, group in (each for each in memberships if len(each) == 3):
            if (controllers == "") if kind == "cgroup2" else ("cpu" in controllers.split(",")):
                top = root / point.replace("\\040", " ").lstrip("/")
                yield from _from_top_to(group, shown, top)


def _from_top_to(group: str, shown: str, top: Path) -> Iterator[Path]:
    """`top`, where the group `shown` is mounted, and the groups below it down to `group`."""
    yield top
    below = Path(group).relative_to(shown) if Path(group).is_relative_to(shown) else Path()
    if ".." not in below.parts:  # else it lies outside of what a container sees
        for depth in range(1, len(below.parts) + 1):
            yield top.joinpath(*below.parts[:depth])


def _quota(folder: Path) -> float | None:
    """Cores' worth of time that one group grants; None without a limit."""
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        try:
            quota, period = (int(n) for name in names for n in (folder / name).read_text().split())
        except (OSError, ValueError):  # no such file, "max", or nothing that the kernel writes
            continue
        if quota > 0 and period > 0 and quota / period < _MOST:
            return quota / period
    return None
