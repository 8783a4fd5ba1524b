"""Labels that are dropped in training, so that one network learns p(x | y) and p(x)."""

import torch
from torch import Tensor

from trainer.diffusion.keyed_noise import Stream, keyed_uniform


def drop_labels(label: Tensor, position: Tensor, *, seed: int, probability: float, null: int) -> Tensor:
    """Ho and Salimans 2022, algorithm 1: the null class in place of a label, with the given probability.

    label: (B,) int64; position: (B,) int64, the images' places in the run: whether a label is dropped is a function of
    the seed and the position. Returns (B,) int64.
    """
    dropped = keyed_uniform(seed, Stream.LABEL_DROP, position, 1)[:, 0] < probability
    return torch.where(dropped, null, label)
