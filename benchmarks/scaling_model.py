"""Data parallelism over more nodes than one has, on paper.

A ring all-reduce sends each rank's gradients 2 (R - 1) / R times through the slowest link of the ring: that of a rank
within its node, or that of a node to the others. What is hidden behind the backward pass is the share that was
measured, and no more than the backward pass takes. The model knows no switches, no stragglers and no other traffic: a
bound to hold a measurement against, not a promise.
"""

import itertools
from dataclasses import dataclass

BACKWARD = 2 / 3  # of a step's computation, in FLOPs: what communication can hide behind


@dataclass(frozen=True, kw_only=True)
class Links:
    """Bandwidths in bytes per second, one way: of a rank to the others of its node; of a node to the others."""

    node: float
    network: float


def modelled_step(
    compute: float, gradient_bytes: float, *, nodes: int, ranks_per_node: int, links: Links, overlap: float
) -> float:
    """Seconds of a step of `nodes` x `ranks_per_node` ranks, of which computing takes `compute`: see the module."""
    ranks = nodes * ranks_per_node
    sent = 2 * (ranks - 1) / ranks * gradient_bytes
    slowest = links.node if nodes == 1 else min(links.node, links.network)
    communication = sent / slowest
    return compute + max(communication * (1 - overlap), communication - BACKWARD * compute)


def modelled(
    compute: float, gradient_bytes: float, *, ranks_per_node: int, links: Links, overlap: float, most_nodes: int
) -> list[dict[str, float]]:
    """Rows for 1, 2, 4 ... `most_nodes` nodes; efficiency is to one rank alone."""
    rows = []
    for nodes in itertools.takewhile(lambda n: n <= most_nodes, (2**power for power in itertools.count())):
        step = modelled_step(
            compute, gradient_bytes, nodes=nodes, ranks_per_node=ranks_per_node, links=links, overlap=overlap
        )
        rows.append({"nodes": nodes, "ranks": nodes * ranks_per_node, "step": step, "efficiency": compute / step})
    return rows
