"""Frozen parameters (`train.freeze`): no gradients, no moments; they and their averages stay as they started."""

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn

from trainer.diffusion.contract import MODEL
from trainer.errors import ConfigError


def freeze(networks: Mapping[str, nn.Module], patterns: Iterable[str]) -> None:
    """Freeze what the patterns name: a network, or parameters as in "down.0.*", which is of the network "model", and
    "critic.conv.*", of another.

    Raises ConfigError where a pattern names nothing, or nothing is left to train.
    """
    parameters = {
        (network, name if network == MODEL else f"{network}.{name}"): parameter
        for network, module in networks.items()
        for name, parameter in module.named_parameters()
    }
    for pattern in patterns:
        named = [p for (network, name), p in parameters.items() if pattern == network or fnmatchcase(name, pattern)]
        if not named:
            known = [*networks, *(name for _, name in parameters)]
            nearest = difflib.get_close_matches(pattern, known, n=1, cutoff=0.0)
            raise ConfigError(
                f"train.freeze: {pattern!r} names no network and no parameter; the nearest is {nearest[0]}", agreed=True
            )
        for parameter in named:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError("train.freeze: freezes everything, so there is nothing to train", agreed=True)
