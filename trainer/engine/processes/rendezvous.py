"""Joins the process group, again after every restart of the workers.

A launcher's store outlives its workers, so after a restart it still holds the addresses of the previous workers. No
environment variable identifies the attempt: TORCHELASTIC_RESTART_COUNT counts the failures of one node's own workers,
so it differs between nodes that restart together. Rank 0 therefore numbers the attempts in the store and every other
rank confirms the number; the keys of each attempt have the number as a prefix.
"""

import contextlib
import os
import socket
import time
import uuid
from datetime import timedelta

import psutil
import torch.distributed as dist

from trainer import world
from trainer.errors import TrainerError

_POLL_SECONDS = 0.02
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_joined: dist.Store | None = None


def join(backend: str, timeout: timedelta) -> None:
    """Create the default process group of the launched processes; does nothing where there is only this one.

    `timeout`: how long to wait for the other ranks, here and in every collective. Raises TrainerError where ranks are
    missing; the message has their numbers.
    """
    global _joined
    if dist.is_initialized() or ("LOCAL_RANK" not in os.environ and world.world_size() == 1):
        return
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise TrainerError(
            f"{', '.join(missing)}: not set, though LOCAL_RANK or WORLD_SIZE says that a launcher was here"
        )
    rank, world_size = world.rank(), world.world_size()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline = time.monotonic() + timeout.total_seconds()
    if world.local_world_size() != world_size:
        _choose_interface(host, port)
    try:
        store = dist.TCPStore(
            host, port, is_master=hosts_store(), timeout=timeout, wait_for_workers=False, multi_tenant=True
        )
        attempt = _call_roll(store, world_size, deadline) if rank == 0 else _answer(store, rank, deadline)
    except dist.DistError as error:
        raise TrainerError(
            f"rank {rank}: no store at MASTER_ADDR:MASTER_PORT = {host}:{port} ({_first_line(error)})"
        ) from error
    _joined = dist.PrefixStore(f"attempt-{attempt}", store)
    try:
        dist.init_process_group(backend, store=_joined, rank=rank, world_size=world_size, timeout=timeout)
    except RuntimeError as error:
        raise TrainerError(
            f"rank {rank}: cannot connect to the others, by way of GLOO_SOCKET_IFNAME = "
            f"{os.environ.get('GLOO_SOCKET_IFNAME', 'the address of the host name')}: {_first_line(error)}"
        ) from error


def hosts_store() -> bool:
    """Whether this process hosts the store of all ranks: rank 0 does, unless torch's launcher does."""
    return world.rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def own_connection() -> dist.Store:
    """A separate connection to the store of this attempt, so that it is not blocked by another thread's waiting.

    Without a process group, a store of this process alone.
    """
    if _joined is None:
        return dist.HashStore()
    return dist.PrefixStore("watch", _joined.clone())  # type: ignore[attr-defined]  # missing from torch's stubs


def _call_roll(store: dist.Store, world_size: int, deadline: float) -> int:
    """Rank 0: number this attempt, and answer requests for the number until every rank has confirmed it.

    Requests that previous workers left are answered too; nothing reads those answers.
    """
    attempt = store.add("attempts", 1)
    answered: dict[int, bytes] = {}
    absent = set(range(1, world_size))
    while absent:
        for rank in sorted(absent):
            if store.check([f"asks/{rank}"]) and (question := store.get(f"asks/{rank}")) != answered.get(rank):
                answered[rank] = question
                store.set(f"answer/{question.decode()}", str(attempt))
            if store.check([f"attempt-{attempt}/present/{rank}"]):
                absent.remove(rank)
        if absent and time.monotonic() > deadline:
            raise TrainerError(
                f"of {world_size} processes these have not come: rank {', '.join(map(str, sorted(absent)))}"
            )
        time.sleep(_POLL_SECONDS if absent else 0)
    return attempt


def _answer(store: dist.Store, rank: int, deadline: float) -> int:
    """Other ranks: request the attempt's number under a key that is unique to this process, and confirm it."""
    question = uuid.uuid4().hex
    store.set(f"asks/{rank}", question)
    while not store.check([f"answer/{question}"]):
        if time.monotonic() > deadline:
            raise TrainerError(f"rank {rank}: rank 0 has not come")
        time.sleep(_POLL_SECONDS)
    attempt = int(store.get(f"answer/{question}"))
    store.set(f"attempt-{attempt}/present/{rank}", "")
    with contextlib.suppress(dist.DistError):
        store.delete_key(f"answer/{question}")
    return attempt


def _choose_interface(host: str, port: int) -> None:
    """Set gloo's network interface to the one that routes to rank 0, unless the user has set it.

    By default gloo resolves the host's own name, by /etc/hosts on Debian to 127.0.1.1, which no other host can reach.
    On rank 0's own host the route may be the loopback; then the only other interface is used, if there is exactly one.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or host in ("localhost", "127.0.0.1"):
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, port))  # UDP: sends no packet
        except OSError:
            return
        source = probe.getsockname()[0]
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    outward = {
        address.address: name
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if name in up and address.family == socket.AF_INET and not address.address.startswith("127.")
    }
    names = {outward[source]} if source in outward else set(outward.values())
    if len(names) == 1:
        os.environ["GLOO_SOCKET_IFNAME"] = names.pop()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
