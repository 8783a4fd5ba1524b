"""A trained network with the classes and the guidance that a request asks for."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from trainer.config.backbones import ModelConfig, class_conditional, classes_of, upsampler
from trainer.data.images import Pixels, from_uint8
from trainer.diffusion.contract import Conditioning, Denoiser, Objective
from trainer.diffusion.keyed_noise import KeyedNoise
from trainer.diffusion.low_res import MADE, with_noise
from trainer.errors import ConfigError
from trainer.models.backbones import BACKBONES
from trainer.sampling.conditions import UNIFORM, written
from trainer.sampling.guidance import ClassifierGuided, Guided, Thresholded, classifier_free
from trainer.sampling.request import ReverseRequest

_NO_LOW_RES: Conditioning = MappingProxyType({})


def check_drawable(model: ModelConfig, *, upsamples: bool = False) -> None:
    """Raise ConfigError where a network of this section draws nothing, or takes more than samples can be given: a
    class, and with `upsamples`, in a cascade, an image of low resolution.
    """
    if model.classifies:
        raise ConfigError(f"model.kind = {model.kind}: a classifier draws no samples; it guides others", agreed=True)
    given = {"label"} if classes_of(model) is not None else set[str]()
    if upsamples and upsampler(model) is not None:
        given.update(MADE)
    further = sorted(BACKBONES[model.kind].conditioning(model, 1).keys() - given)
    if further:
        takes = ", ".join(further)
        outside = "" if upsampler(model) is None else " outside a cascade (docs/cascades.md)"
        what = f"it takes {takes}, which samples cannot be given{outside}"
        raise ConfigError(f"model.kind = {model.kind}: {what}", agreed=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class GuideNetwork:
    """A network that guides another one; `fingerprint` is unique to its checkpoint."""

    objective: Objective
    network: nn.Module
    model: ModelConfig
    fingerprint: str


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassifierNetwork:
    """A classifier of noisy images that guides a network; `fingerprint` is unique to its checkpoint."""

    network: nn.Module
    classes: int
    fingerprint: str


@dataclass(frozen=True, kw_only=True, eq=False)
class ConditionedNetwork:
    """A network in eval mode, on the device, as a request has samples drawn from it.

    request: its conditions must have passed their `check` with `model`; guide, classifier: the networks of
    `conditions.guide` and `conditions.classifier`, where those are set.
    """

    objective: Objective
    network: nn.Module
    model: ModelConfig
    request: ReverseRequest
    device: torch.device
    guide: GuideNetwork | None = None
    classifier: ClassifierNetwork | None = None

    def denoiser_of(self, numbers: Sequence[int], *, seed: int, low_res: Conditioning = _NO_LOW_RES) -> Denoiser:
        """The denoiser for a batch of the samples with these numbers, of their classes, guided.

        low_res: of a network that upsamples, from the method of that name.
        """
        conditions = self.request.conditions
        labels = self.labels(numbers, seed=seed)
        cond = {**low_res} if classes_of(self.model) is None or labels is None else {**low_res, "label": labels}
        how: dict[str, Any] = {"scale": conditions.guidance, "interval": conditions.guidance_interval}
        denoiser: Denoiser
        if conditions.guidance == 1:
            denoiser = self.given(cond)
        elif self.guide is not None:
            takes_labels = classes_of(self.guide.model) is not None
            given = {name: value for name, value in cond.items() if takes_labels or name != "label"}
            guide = self.guide.objective.denoiser(self.guide.network, given, respacing=self.request.respacing)
            denoiser = Guided(self.given(cond), guide, **how)
        else:
            denoiser = classifier_free(self.given, cond, self._null(cond), **how)
        if conditions.dynamic_threshold is not None:
            denoiser = Thresholded(denoiser, conditions.dynamic_threshold)
        if self.classifier is not None:
            assert labels is not None
            denoiser = ClassifierGuided(denoiser, self.classifier.network, labels, scale=conditions.classifier_scale)
        return denoiser

    def given(self, cond: Conditioning) -> Denoiser:
        """The denoiser of the network itself for the conditioning of a batch, not guided."""
        return self.objective.denoiser(self.network, cond, respacing=self.request.respacing)

    def low_res(self, pixels: Pixels, noise: KeyedNoise) -> dict[str, torch.Tensor]:
        """What a network that upsamples is given of images (B, C, h, w) uint8, noised as the request asks."""
        section = upsampler(self.model)
        assert section is not None
        low_res = from_uint8(torch.from_numpy(pixels).to(self.device))
        if not section.low_res_noise:
            return {"low_res": low_res}
        level = torch.full((len(pixels),), self.request.conditions.low_res_noise, device=self.device)
        return with_noise(low_res, level, noise)

    def labels(self, numbers: Sequence[int], *, seed: int) -> torch.Tensor | None:
        """The classes of the samples with these numbers, (B,) int64; None where no network has any."""
        classes = self._classes
        if classes is None:
            return None
        given = torch.tensor(list(numbers), device=self.device)
        return self.request.conditions.labels(given, seed=seed, classes=classes)

    @property
    def identity(self) -> dict[str, Any]:
        """What samples depend on besides weights and sampler; empty where there are neither classes nor guidance."""
        others: dict[str, GuideNetwork | ClassifierNetwork | None]
        others = {"guide": self.guide, "classifier": self.classifier}
        found = {name: other.fingerprint for name, other in others.items() if other is not None}
        return {n: list(v) if isinstance(v, tuple) else v for n, v in (self._asked | found).items()}

    @property
    def description(self) -> str:
        """For people, ", classes uniform, guidance 2"; empty as `identity` is."""
        return "".join(f", {name.replace('_', ' ')} {written(value)}" for name, value in self._asked.items())

    def cost(self) -> str | None:
        """A line on the calls of networks that guidance takes; None without guidance."""
        conditions = self.request.conditions
        told: list[str] = []
        diffusion = self.given({}).diffusion
        steps = diffusion.timesteps
        if conditions.guidance != 1:
            calls = conditions.calls(diffusion)
            told.append(f"guidance {conditions.guidance:g}: {calls:,} network calls a sample, {steps:,} without")
        if self.classifier is not None:
            told.append(f"classifier: {steps:,} calls and gradients of it a sample")
        return "; ".join(told) or None

    @property
    def _classes(self) -> int | None:
        own = classes_of(self.model)
        return self.classifier.classes if own is None and self.classifier is not None else own

    @property
    def _asked(self) -> dict[str, Any]:
        classes = {} if self._classes is None else {"classes": UNIFORM}
        return classes | self.request.conditions.asked

    def _null(self, cond: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        labelled = class_conditional(self.model)
        assert labelled is not None
        assert labelled.null_label is not None
        return {**cond, "label": torch.full_like(cond["label"], labelled.null_label)}
