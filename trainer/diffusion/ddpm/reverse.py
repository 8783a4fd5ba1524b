"""What a network's output means: the reverse process p(x_{t-1} | x_t) of Ho et al. 2020, section 3.2."""

from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Self, get_args

import torch
from einops import rearrange
from torch import Tensor
from typing_extensions import override

from trainer.config.families import PredictionKind, ReverseVariance, is_learned
from trainer.diffusion import contract
from trainer.diffusion.contract import Conditioning, Network
from trainer.diffusion.ddpm.process import GaussianDiffusion


@dataclass(frozen=True, kw_only=True)
class ReverseStep(contract.Prediction):
    """p(x_{t-1} | x_t) = N(mean, exp(log_variance)), and the x_0 and eps that go with it.

    At t = 0 the log variance is that of the decoder, log beta~_1 where it is not learned. What it was read from: x_t,
    t (B,) of `diffusion`, whether the network predicts the mean itself ("mu"), and whether the variance is "small".
    """

    x_t: Tensor
    t: Tensor
    diffusion: GaussianDiffusion
    predicts_mean: bool
    is_small: bool

    @property
    @override
    def variance(self) -> Tensor:
        """exp(log_variance), but for "small" 0 at t = 0, as beta~_1 is, as in guided-diffusion."""
        variance = super().variance
        return torch.where(rearrange(self.t > 0, "b -> b 1 1 1"), variance, 0.0) if self.is_small else variance

    @override
    def with_x0(self, x0: Tensor) -> Self:
        """The step that another x_0, (B, C, H, W) float32, leads to: eps and the mean follow, the variance stays."""
        eps = self.diffusion.predict_eps(self.x_t, self.t, x0)
        return replace(self, x0=x0, eps=eps, mean=self.diffusion.posterior_mean(x0, self.x_t, self.t))

    @override
    def clipped(self) -> Self:
        """The step with x_0 clamped to [-1, 1].

        A mean that the network predicts itself stays as it is, as in the authors' code.
        """
        step = self.with_x0(self.x0.clamp(-1, 1))
        return replace(step, mean=self.mean) if self.predicts_mean else step


def check_parameterisation(prediction: str, variance: str) -> None:
    """Raises ValueError for names that are none of `PredictionKind` and `ReverseVariance`."""
    for name, value, known in (
        ("prediction", prediction, get_args(PredictionKind)),
        ("variance", variance, get_args(ReverseVariance)),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(known)}")


def output_channels(channels: int, variance: ReverseVariance) -> int:
    """Channels of the network's output for images of `channels`: twice as many where the variance is learned.

    The first half is the prediction, the second the variance.
    """
    return 2 * channels if is_learned(variance) else channels


def interpret(
    output: Tensor,
    x_t: Tensor,
    t: Tensor,
    *,
    diffusion: GaussianDiffusion,
    prediction: PredictionKind,
    variance: ReverseVariance,
) -> ReverseStep:
    """The reverse step that a network's output describes, x_0 not clamped. Differentiable; everything is float32.

    output: (B, C or 2C, H, W), see `output_channels`; x_t: (B, C, H, W); t: (B,) int64 of `diffusion`.
    prediction: the first half is eps (equation 11 gives the mean), x_0, mu~ itself or v (Salimans and Ho 2022).
    variance: "small" beta~_t, "large" beta_t; "learned": the second half is log sigma^2 itself; "learned-range": it is
        v of Nichol and Dhariwal 2021, equation 15, which interpolates (v from -1 to 1, unbounded) between
        log beta~_t and log beta_t.
    """
    channels = x_t.shape[1]
    expected = output_channels(channels, variance)
    if output.shape[1] != expected:
        raise ValueError(f"output: must have {expected} channels for variance={variance!r}, got {output.shape[1]}")
    predicted, spread = output.float().split([channels, expected - channels], dim=1)
    x_t = x_t.float()

    if prediction == "eps":
        x0, eps = diffusion.predict_x0(x_t, t, predicted), predicted
    elif prediction == "v":
        x0, eps = diffusion.x0_from_v(x_t, t, predicted), diffusion.eps_from_v(x_t, t, predicted)
    else:
        x0 = diffusion.x0_from_mu(x_t, t, predicted) if prediction == "mu" else predicted
        eps = diffusion.predict_eps(x_t, t, x0)
    mean = predicted if prediction == "mu" else diffusion.posterior_mean(x0, x_t, t)
    log_variance = _log_variance(spread, t, diffusion, variance).expand_as(x_t)
    return ReverseStep(
        x0=x0,
        eps=eps,
        mean=mean,
        log_variance=log_variance,
        x_t=x_t,
        t=t,
        diffusion=diffusion,
        predicts_mean=prediction == "mu",
        is_small=variance == "small",
    )


def _log_variance(spread: Tensor, t: Tensor, diffusion: GaussianDiffusion, variance: ReverseVariance) -> Tensor:
    """log sigma_t^2, to broadcast: (B, C, H, W) where it is learned, (B, 1, 1, 1) where it is fixed."""
    if variance == "learned":
        return spread
    if variance == "learned-range":
        low = rearrange(diffusion.log_beta_tilde[t], "b -> b 1 1 1")
        high = rearrange(diffusion.log_beta[t], "b -> b 1 1 1")
        share = (spread + 1) / 2
        return share * high + (1 - share) * low
    return rearrange(diffusion.posterior_log_variance(t, variance), "b -> b 1 1 1")


@dataclass(eq=False)
class ReverseProcess:
    """The denoiser of this family: a network, what its output means, and the conditioning that it is given.

    network: at x_t (B, C, H, W) and t (B,) int64 of the chain it was trained on -> (B, C or 2C, H, W); for samplers and
    evaluation it must be in eval mode. diffusion: its tables on the network's device; may be respaced.
    prediction and variance: see `interpret`; cond: tensors of B rows. ValueError for other names.
    """

    network: Network
    diffusion: GaussianDiffusion
    _: KW_ONLY
    prediction: PredictionKind = "eps"
    variance: ReverseVariance
    cond: Conditioning = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_parameterisation(self.prediction, self.variance)

    def __call__(self, x_t: Tensor, t: Tensor) -> ReverseStep:
        """Call the network at x_t (B, C, H, W) and t (B,) int64 of `diffusion`, and interpret its output."""
        output = self.network(x_t, self.diffusion.original_t(t), **self.cond)
        return interpret(output, x_t, t, diffusion=self.diffusion, prediction=self.prediction, variance=self.variance)

    def respaced(self, steps: Tensor) -> Self:
        """The same on the chain that visits only `steps` of this one: see `GaussianDiffusion.respaced`."""
        return replace(self, diffusion=self.diffusion.respaced(steps))
