"""Guidance: denoisers that wrap others and move what they predict, for every family and every sampler.

eps is affine in x_0 at a given x_t, so all of it is said of x_0, from which a family's own prediction follows. The
wrappers nest: classifier-free guidance or autoguidance first, then the threshold, then a classifier's gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from typing_extensions import override

from trainer.diffusion.contract import Conditioning, Denoiser, ForwardProcess, Prediction

Interval = tuple[float, float]
"""(low, high]: the noise levels sigma = sqrt(1 / abar - 1) at which a prediction is guided."""

Classifier = Callable[[Tensor, Tensor], Tensor]
"""x_t (B, C, H, W) and t (B,) int64 of the whole chain to logits (B, K)."""


def guided_timesteps(diffusion: ForwardProcess, interval: Interval | None) -> Tensor:
    """Which timesteps of the process lie in the interval (None: all do): (T,) bool, on the CPU."""
    if interval is None:
        return torch.ones(diffusion.timesteps, dtype=torch.bool)
    low, high = interval
    sigma = (1 / diffusion.abar64 - 1).sqrt()
    return (sigma > low) & (sigma <= high)


class Guided:
    """Extrapolates from the prediction of a guide through the main one: x0 = guide + scale (main - guide).

    Classifier-free guidance (Ho and Salimans 2022), where the guide is the same network without a class; their w is
    scale - 1. Autoguidance (Karras et al. 2024), where it is a smaller or less trained network with the same class. The
    variance is the main prediction's. Nothing is clipped: samplers clip what comes out.

    main, guide: denoisers of one process; scale: 1 is `main`, which does not call the guide, and 0 is `guide`, which
    does not call the main one; interval: outside of it `main` alone is called (Kynkäänniemi et al. 2024); both: a
    denoiser with the conditioning of `main` and then of `guide`, 2 B rows, which is called once in place of the two.
    ValueError where main and guide have different processes.
    """

    def __init__(
        self,
        main: Denoiser,
        guide: Denoiser,
        *,
        scale: float,
        interval: Interval | None = None,
        both: Denoiser | None = None,
    ) -> None:
        if not torch.equal(main.diffusion.abar64, guide.diffusion.abar64):
            raise ValueError("guide: must have the noise levels of the denoiser that it guides")
        self.main = main
        self.guide = guide
        self.scale = scale
        self.both = both
        self.diffusion = main.diffusion
        self._everywhere = interval is None
        self._is_guided = guided_timesteps(main.diffusion, interval).to(main.diffusion.original_timesteps.device)

    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        """See `Denoiser`."""
        if self.scale == 1:
            return self.main(x, t)
        guided = self._is_guided[t]
        if not (self._everywhere or guided.any()):
            return self.main(x, t)
        if self.scale == 0 and (self._everywhere or guided.all()):
            return self.guide(x, t)
        main, guide = self._predict(x, t)
        x0 = guide.x0 + self.scale * (main.x0 - guide.x0)
        return main.with_x0(torch.where(rearrange(guided, "b -> b 1 1 1"), x0, main.x0))

    def _predict(self, x: Tensor, t: Tensor) -> tuple[Prediction, Prediction]:
        if self.both is None:
            return self.main(x, t), self.guide(x, t)
        together = self.both(torch.cat((x, x)), torch.cat((t, t)))
        return together[: len(x)], together[len(x) :]


def classifier_free(
    denoiser_of: Callable[[Conditioning], Denoiser],
    cond: Conditioning,
    null: Conditioning,
    *,
    scale: float,
    interval: Interval | None = None,
) -> Guided:
    """Classifier-free guidance of one network, which is called once for both: at equal x and t, [cond; null].

    denoiser_of: the network's denoiser for a conditioning; cond, null: the same names, B rows each; the rest: `Guided`.
    """
    both = {name: torch.cat((cond[name], null[name])) for name in cond}
    return Guided(denoiser_of(cond), denoiser_of(null), scale=scale, interval=interval, both=denoiser_of(both))


def dynamic_threshold(x0: Tensor, quantile: float) -> Tensor:
    """Saharia et al. 2022, section 2.3: clamp each sample to [-s, s] and divide it by s, where s is that quantile of
    its |x_0| (linear between two values), and at least 1.

    x0: (B, ...) floating point; quantile: in [0, 1]. Returns the same shape, in [-1, 1].
    """
    values = x0.abs().flatten(1).sort(dim=1).values
    position = quantile * (values.shape[1] - 1)
    below = int(position)
    above = min(below + 1, values.shape[1] - 1)
    s = torch.lerp(values[:, below], values[:, above], position - below).clamp(min=1)
    s = s.reshape(-1, *[1] * (x0.ndim - 1))
    return torch.maximum(torch.minimum(x0, s), -s) / s


class Thresholded:
    """A denoiser whose x_0 has been through `dynamic_threshold`, after which clipping changes nothing."""

    def __init__(self, denoiser: Denoiser, quantile: float) -> None:
        self.denoiser = denoiser
        self.quantile = quantile
        self.diffusion = denoiser.diffusion

    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        """See `Denoiser`."""
        p = self.denoiser(x, t)
        return p.with_x0(dynamic_threshold(p.x0, self.quantile))


def class_gradient(classifier: Classifier, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """The gradient at x of the sum over samples of log softmax(classifier(x, t))[label], in float32 at least.

    x: (B, C, H, W); t: (B,) int64 of the whole chain; label: (B,) int64. Returns x's shape; works under no_grad.
    """
    with torch.enable_grad():
        x = _exact(x.detach()).requires_grad_()
        log_probability = F.log_softmax(_exact(classifier(x, t)), dim=1)
        of_labels = log_probability.gather(1, label[:, None]).sum()
        (gradient,) = torch.autograd.grad(of_labels, x)
    return gradient


def _exact(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


@dataclass(frozen=True, kw_only=True)
class Shifted(Prediction):
    """A prediction moved along the gradient of a log probability, as guided-diffusion does it.

    Ancestral sampling takes the mean, mu + Sigma shift (Dhariwal and Nichol 2021, algorithm 1), with an x_0 that has
    not moved; DDIM takes x_0 and eps, eps - sqrt(1 - abar) shift (algorithm 2), so x_0 + (1 - abar) / sqrt(abar) shift.

    unguided: the prediction before; shift: the scale times the gradient at x_t, (B, C, H, W); x0_per_shift: (1 - abar)
    / sqrt(abar), (B, 1, 1, 1).
    """

    unguided: Prediction
    shift: Tensor
    x0_per_shift: Tensor

    @classmethod
    def of(cls, p: Prediction, shift: Tensor, x0_per_shift: Tensor) -> Self:
        """What becomes of a prediction."""
        moved = p.with_x0(p.x0 + x0_per_shift * shift)
        return cls(
            x0=moved.x0,
            eps=moved.eps,
            mean=p.mean + p.variance * shift,
            log_variance=p.log_variance,
            unguided=p,
            shift=shift,
            x0_per_shift=x0_per_shift,
        )

    @property
    @override
    def variance(self) -> Tensor:
        """That of the prediction before."""
        return self.unguided.variance

    @property
    @override
    def x0_of_mean(self) -> Tensor:
        """The x_0 before, from which the mean was made."""
        return self.unguided.x0_of_mean

    @override
    def with_x0(self, x0: Tensor) -> Self:
        """Of this x_0 itself, which is not moved again."""
        p = self.unguided.with_x0(x0)
        still = torch.zeros_like(self.shift)
        return replace(self, x0=p.x0, eps=p.eps, mean=p.mean, unguided=p, shift=still)

    @override
    def clipped(self) -> Self:
        """The clipped prediction moved: x_0 is clamped before, and not again."""
        return self.of(self.unguided.clipped(), self.shift, self.x0_per_shift)


class ClassifierGuided:
    """Classifier guidance (Dhariwal and Nichol 2021, section 4), in the form of guided-diffusion: see `Shifted`.

    The gradient is taken at x_t (the paper's algorithm 1 has it at the mean) and at the timestep of the whole chain, by
    which the classifier was trained, also where fewer are visited.
    classifier: in eval mode; label: (B,) int64; scale: that of the gradient. It does not carry over to another number
    of steps.
    """

    def __init__(self, denoiser: Denoiser, classifier: Classifier, label: Tensor, *, scale: float) -> None:
        self.denoiser = denoiser
        self.classifier = classifier
        self.label = label
        self.scale = scale
        self.diffusion = denoiser.diffusion
        abar = denoiser.diffusion.abar64
        self._x0_per_shift = ((1 - abar) / abar.sqrt()).to(denoiser.diffusion.original_timesteps.device)

    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        """See `Denoiser`."""
        p = self.denoiser(x, t)
        shift = self.scale * class_gradient(self.classifier, x, self.diffusion.original_timesteps[t], self.label)
        return Shifted.of(p, shift, rearrange(self._x0_per_shift[t].to(p.x0.dtype), "b -> b 1 1 1"))
