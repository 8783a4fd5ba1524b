"""What samples are drawn of, and how strongly: their classes, and guidance."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.config.backbones import ModelConfig, class_conditional, classes_of, upsampler
from trainer.diffusion.contract import ForwardProcess
from trainer.diffusion.keyed_noise import Stream, keyed_choice
from trainer.sampling.guidance import Interval, guided_timesteps
from trainer.sampling.request_error import RequestError

UNIFORM, BALANCED = "uniform", "balanced"


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The classes of samples, and guidance; the defaults ask for neither.

    classes: "uniform", each sample's class drawn by the seed and its number; "balanced", number modulo classes; or
    classes as "3,5,7", which the samples take in turn; None: "uniform" where the network takes labels. guidance: the
    scale s of trainer/sampling/guidance.py; 1 is without. guidance_interval: the noise levels (low, high] that it
    applies to; None: all. dynamic_threshold: the quantile of `dynamic_threshold`; None: samplers clamp instead. guide:
    the run, or the checkpoint of one, whose network guides; None: the null class does. classifier: the run, or the
    checkpoint of one, of a classifier whose gradient guides as well, classifier_scale times; None: none. low_res_noise:
    of a network that upsamples, the level to which what it is given is noised.

    RequestError where one of them is not possible, or they do not go together.
    """

    classes: str | None = None
    guidance: float = 1.0
    guidance_interval: Interval | None = None
    dynamic_threshold: float | None = None
    guide: Path | None = None
    classifier: Path | None = None
    classifier_scale: float = 1.0
    low_res_noise: float = 0.0

    def __post_init__(self) -> None:
        if self.classes is not None and not re.fullmatch(rf"{UNIFORM}|{BALANCED}|\d+(,\d+)*", self.classes):
            raise RequestError("classes", self.classes, f"should be {UNIFORM}, {BALANCED}, or classes such as 3,5,7")
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise RequestError("guidance", self.guidance, "should be a number from 0; 1 is without guidance")
        for name in ("guidance_interval", "guide"):
            if getattr(self, name) is not None and self.guidance == 1:
                raise RequestError(name, written(getattr(self, name)), "goes with a guidance other than 1")
        if self.guidance_interval is not None and not 0 <= self.guidance_interval[0] < self.guidance_interval[1]:
            low_high = written(self.guidance_interval)
            raise RequestError("guidance_interval", low_high, "should be two noise levels from 0, the lower first")
        if self.dynamic_threshold is not None and not 0 < self.dynamic_threshold < 1:
            raise RequestError("dynamic_threshold", self.dynamic_threshold, "should be a quantile, above 0 and below 1")
        if not (math.isfinite(self.classifier_scale) and self.classifier_scale > 0):
            raise RequestError("classifier_scale", self.classifier_scale, "should be a number above 0")
        if self.classifier_scale != 1 and self.classifier is None:
            raise RequestError("classifier_scale", written(self.classifier_scale), "goes with a classifier")
        if not 0 <= self.low_res_noise <= 1:
            raise RequestError("low_res_noise", self.low_res_noise, "should be a level from 0, without noise, to 1")

    def check(self, model: ModelConfig) -> None:
        """Raise RequestError where a network of this section cannot be drawn from in this way."""
        labelled, classes = class_conditional(model), classes_of(model)
        if classes is not None:
            self.check_listed(classes)
        elif self.classes is not None and self.classifier is None:
            raise RequestError("classes", self.classes, "goes with a network that takes labels; this one takes none")
        if self.guidance != 1 and self.guide is None and (labelled is None or labelled.null_label is None):
            raise RequestError(
                "guidance",
                self.guidance,
                "needs a null class, that is a network trained with model.label_drop above 0, or a guide",
            )
        upsamples = upsampler(model)
        most = 0.0 if upsamples is None else upsamples.low_res_noise
        if self.low_res_noise > most:
            raise RequestError(
                "low_res_noise",
                self.low_res_noise,
                f"should be from 0 to the model.low_res_noise that the network was trained with, {most:g}",
            )

    def check_listed(self, classes: int) -> None:
        """Raise RequestError where a class is asked for that is not among so many."""
        if self._listed and max(self._listed) >= classes:
            raise RequestError("classes", self.classes, f"should be from 0 to {classes - 1}")

    def labels(self, numbers: Tensor, *, seed: int, classes: int) -> Tensor:
        """The class of each sample, a function of its number and the seed: (B,) int64 -> (B,) int64 below `classes`."""
        if self._listed:
            return torch.tensor(self._listed, device=numbers.device)[numbers % len(self._listed)]
        return numbers % classes if self.classes == BALANCED else keyed_choice(seed, Stream.CLASS, numbers, classes)

    def calls(self, diffusion: ForwardProcess) -> int:
        """How often the networks predict for one sample, over the timesteps of the process."""
        twice = 0 if self.guidance in (0, 1) else int(guided_timesteps(diffusion, self.guidance_interval).sum())
        return diffusion.timesteps + twice

    @property
    def name_parts(self) -> list[str]:
        """For names of files: what is asked for."""
        runs = {"guide": "by", "classifier": "classifier"}
        asked = {name.replace("_", "-"): written(value) for name, value in self.asked.items() if name not in runs}
        others = [part for name, word in runs.items() if (run := getattr(self, name)) for part in (word, run.name)]
        return ["-".join([name, value.replace(",", "-")]) for name, value in asked.items()] + others

    @property
    def asked(self) -> dict[str, Any]:
        """The fields that differ from their defaults, by name."""
        return {name: value for name, value in vars(self).items() if value != getattr(type(self), name)}

    @property
    def _listed(self) -> list[int]:
        if self.classes in (None, UNIFORM, BALANCED):
            return []
        return [int(label) for label in str(self.classes).split(",")]


def written(value: Any) -> str:
    """As it is written on a command line."""
    if isinstance(value, tuple):
        return ",".join(f"{part:g}" for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
