"""The Inception score (Salimans et al. 2016): how sure a classifier is of each image, and how images differ."""

from collections.abc import Iterator

import numpy as np
import torch

SHUFFLE_SEED = 2020  # torch-fidelity's: the same logits give its number


def score(logits: torch.Tensor) -> float:
    """exp(E[KL(p(y|x) || p(y))]) of logits (N, K), from 1 to K; computed in float64."""
    log_p = logits.double().log_softmax(dim=1)
    p = log_p.exp()
    divergence = (p * (log_p - p.mean(dim=0).log())).sum(dim=1)
    return float(divergence.mean().exp())


def splits(count: int, number: int) -> Iterator[torch.Tensor]:
    """Rows of 0..count-1 in `number` shuffled parts; the score is the mean over the parts, +- their deviation."""
    shuffled = torch.from_numpy(np.random.RandomState(SHUFFLE_SEED).permutation(count))
    for part in range(number):
        yield shuffled[part * count // number : (part + 1) * count // number]
