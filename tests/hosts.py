"""Two machines on one: namespaces with their own network, name, processes and shared memory, and a cable between them.

Each has Debian's line `127.0.1.1 its-own-name` in /etc/hosts, which tells a process that asks for its own address
nothing that another machine could use. Files are shared, as a cluster's are.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.harness import REPOSITORY, environment
from trainer.signals import on_parents_death

_BOOT = """
set -e
mount --bind "$1" /etc/hosts
mount -t tmpfs tmpfs /dev/shm
hostname "$2"
ip link set lo up
exec sleep infinity
"""


@dataclass
class Host:
    """One of the machines; `pid` is its first process, with which everything on it lives and dies."""

    name: str
    address: str
    pid: int
    cores: str

    def start(self, log: Path, *command: str, **variables: str) -> subprocess.Popen[bytes]:
        """Run a command of the repository on it; what it prints goes to `log`."""
        with log.open("ab") as out:
            return subprocess.Popen(
                [*self._enter(), *command],
                cwd=REPOSITORY,
                env=environment(**variables),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def unplug(self) -> None:
        """Pull its network cable: nobody is told, connections just stay silent."""
        subprocess.run([*self._enter(), "ip", "link", "set", "eth0", "down"], check=True)

    def crash(self) -> None:
        """Pull the cable and the power."""
        self.unplug()
        os.kill(self.pid, signal.SIGKILL)

    def _enter(self) -> list[str]:
        into = ["--target", str(self.pid), "--net", "--uts", "--mount", "--pid", f"--wdns={REPOSITORY}"]
        return ["nsenter", *into, "taskset", "--cpu-list", self.cores]


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """The machines alpha (10.214.0.1) and beta (10.214.0.2), each with half of the cores.

    Where they cannot be had, the test is skipped.
    """
    missing = [tool for tool in ("ip", "unshare", "nsenter", "taskset") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"two hosts need {' and '.join(missing)} (packages iproute2 and util-linux)")
    if os.geteuid() != 0:
        pytest.skip("two hosts need network namespaces, and these root")
    addresses = {"alpha": "10.214.0.1", "beta": "10.214.0.2"}
    machines: list[subprocess.Popen[str]] = []
    try:
        hosts = []
        cores = sorted(os.sched_getaffinity(0))
        for number, (name, address) in enumerate(addresses.items()):
            half = ",".join(str(core) for core in (cores[number::2] or cores))
            others = "".join(f"{other} {host}\n" for host, other in addresses.items() if host != name)
            (folder / f"hosts-{name}").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n{others}")
            machines.append(_boot(folder / f"hosts-{name}", name))
            hosts.append(Host(name, address, _first_process(machines[-1]), half))
        alpha, beta = hosts
        cable = f"ip link add eth0 netns {alpha.pid} type veth peer name eth0 netns {beta.pid}"
        subprocess.run(cable.split(), check=True)
        for host in hosts:
            for setting in (f"addr add {host.address}/24 dev eth0", "link set eth0 up"):
                subprocess.run([*host._enter(), "ip", *setting.split()], check=True)
        yield alpha, beta
    finally:
        for machine in machines:
            machine.kill()  # which kills all that runs on it
            machine.wait()


def _boot(hosts_file: Path, name: str) -> subprocess.Popen[str]:
    namespaces = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
    return subprocess.Popen(
        ["unshare", *namespaces, "sh", "-c", _BOOT, "boot", str(hosts_file), name],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: on_parents_death(signal.SIGKILL),  # no machine survives a test that is killed
    )


def _first_process(machine: subprocess.Popen[str]) -> int:
    """Wait until it sleeps, everything set; its number as it is seen from outside."""
    children = Path(f"/proc/{machine.pid}/task/{machine.pid}/children")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if machine.poll() is not None:
            assert machine.stderr is not None
            pytest.skip(f"two hosts need namespaces: {machine.stderr.read().strip()}")
        pids = children.read_text().split()
        if pids and Path(f"/proc/{pids[0]}/comm").read_text().strip() == "sleep":
            return int(pids[0])
        time.sleep(0.02)
    raise AssertionError("the machine does not boot")
