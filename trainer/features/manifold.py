"""Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020) of sets of features.

Each set stands for the union of balls around its features, each as wide as the distance to the k-th nearest other one.
Precision is the part of the samples within balls of real images, recall that of real images within balls of samples;
density counts in how many balls a sample lies, coverage the real images that have a sample in their ball. Every
function is of some rows against all: rows can be shared out over ranks.
"""

import torch

PRECISION_NEIGHBOURS = 3  # k as in Kynkäänniemi et al. 2019
DENSITY_NEIGHBOURS = 5  # k as in Naeem et al. 2020


def radii(rows: torch.Tensor, features: torch.Tensor, neighbours: tuple[int, ...]) -> torch.Tensor:
    """Of `rows` (B, D), which are among `features` (N, D), the distance to the k-th nearest other one, for each k.

    Returns (B, len(neighbours)). Raises ValueError where there are not k others.
    """
    if len(features) <= max(neighbours):
        raise ValueError(f"{len(features)} features have no {max(neighbours)} neighbours each")
    nearest = torch.cdist(rows, features).topk(max(neighbours) + 1, dim=1, largest=False).values
    return nearest[:, list(neighbours)]  # the nearest, at 0, is itself


def within_any(rows: torch.Tensor, centres: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Which of `rows` (B, D) lie in a ball of `radius` (N,) around any of `centres` (N, D): (B,) bool."""
    return (torch.cdist(rows, centres) <= radius).any(dim=1)


def balls_around(rows: torch.Tensor, centres: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """In how many balls each of `rows` lies: (B,) int64; see `within_any`."""
    return (torch.cdist(rows, centres) < radius).sum(dim=1)


def has_any_within(centres: torch.Tensor, radius: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Which balls of `radius` (B,) around `centres` (B, D) hold any of `features` (N, D): (B,) bool."""
    return (torch.cdist(centres, features) < radius[:, None]).any(dim=1)
