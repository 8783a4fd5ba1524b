"""Averages of any width, made afterwards from snapshots of a few (Karras et al. 2024, section 3.2 and appendix C).

An average with the power-function profile of gamma, after t updates, weighs the network that was there at time tau by
p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1). A weighted sum of snapshots has the weighted sum of their profiles, so
the sum whose profile comes nearest to the wanted one is the wanted average, as near as the snapshots allow.
"""

from collections.abc import Sequence

import torch
from ema_pytorch.post_hoc_ema import p_dot_p, sigma_rel_to_gamma
from torch import Tensor


def combination(snapshots: Sequence[tuple[int, float]], *, updates: int, sigma_rel: float) -> tuple[Tensor, float]:
    """How to add up snapshots, each of (updates so far, sigma_rel), to an average of another sigma_rel at `updates`.

    Least squares between the profiles (algorithm 3), over weights whose sum is 1: a network that never moved is its own
    average, whatever the profile, and few snapshots would else shrink it. Returns the weights, (S,) float64, and what
    stays of the profile, ||sum of profiles - wanted|| / ||wanted||.
    """
    t = torch.tensor([float(t) for t, _ in snapshots], dtype=torch.float64)[:, None]
    gamma = torch.tensor([sigma_rel_to_gamma(sigma) for _, sigma in snapshots], dtype=torch.float64)[:, None]
    wanted_t = torch.tensor([[float(updates)]], dtype=torch.float64)
    wanted_gamma = torch.tensor([[sigma_rel_to_gamma(sigma_rel)]], dtype=torch.float64)
    products = p_dot_p(t, gamma, t.T, gamma.T)
    target = p_dot_p(t, gamma, wanted_t, wanted_gamma)
    # The products between profiles span many orders of magnitude; of profiles of length 1 they are at most 1.
    scale = products.diagonal()[:, None].sqrt()
    one = 1 / scale
    system = torch.cat(
        (
            torch.cat((products / (scale * scale.T), one), dim=1),
            torch.cat((one.T, torch.zeros(1, 1, dtype=torch.float64)), dim=1),
        )
    )
    right = torch.cat((target / scale, torch.ones(1, 1, dtype=torch.float64)))
    # Not `solve`: snapshots close to each other are all but dependent, and the shortest solution is the calmest.
    solution = torch.linalg.lstsq(system, right, driver="gelsd").solution[:-1]
    weights = solution / scale
    length = p_dot_p(wanted_t, wanted_gamma, wanted_t, wanted_gamma)
    left = weights.T @ products @ weights - 2 * weights.T @ target + length
    return weights[:, 0], float((left.clamp(min=0) / length).sqrt())
