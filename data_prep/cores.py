"""Number of cores available to this process: its affinity, and the CPU quota of its container or job."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

_MOST = 10**6  # cores; larger values count as no quota


def available_cores(proc: Path = Path("/proc/self"), root: Path = Path("/")) -> int:
    """Whole cores available to this process, at least 1.

    A quota of 1.5 cores counts as 1: with two busy threads the kernel would throttle both. `proc` and `root` as for
    `cpu_quota`.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, math.floor(cpu_quota(proc, root) or allowed)))


def cpu_quota(proc: Path = Path("/proc/self"), root: Path = Path("/")) -> float | None:
    """CPU quota in cores from the control groups (v1 or v2) of this process; None without a limit.

    `proc`: the process's folder in /proc; `root`: prefix of mount points. Unreadable files count as no limit.
    """
    quotas = [quota for folder in _cpu_groups(proc, root) if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def _cpu_groups(proc: Path, root: Path) -> Iterator[Path]:
    """Folders of the process's control groups with CPU limits, and of all their visible parents."""
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
    if ".." not in below.parts:  # otherwise it is outside of what a container sees
        for depth in range(1, len(below.parts) + 1):
            yield top.joinpath(*below.parts[:depth])


def _quota(folder: Path) -> float | None:
    """CPU quota of one group in cores; None without a limit."""
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        try:
            quota, period = (int(n) for name in names for n in (folder / name).read_text().split())
        except (OSError, ValueError):  # no such file, "max", or malformed
            continue
        if quota > 0 and period > 0 and quota / period < _MOST:
            return quota / period
    return None
