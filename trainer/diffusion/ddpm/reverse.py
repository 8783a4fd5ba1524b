"""What a network's output means: the reverse process p(x_{t-1} | x_t) of Ho et al. 2020, section 3.2."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from einops import rearrange
from torch import Tensor

from trainer.diffusion.ddpm.process import GaussianDiffusion

Prediction = Literal["eps", "x0", "mu", "v"]
ReverseVariance = Literal["small", "large", "learned", "learned-range"]
Network = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class ReverseStep:
    """p(x_{t-1} | x_t) = N(mean, exp(log_variance)), and the x_0 and eps that go with it; each (B, C, H, W) float32.

    At t = 0 the mean is x0 and the log variance that of the decoder, log beta~_1 where it is not learned.
    """

    x0: Tensor
    eps: Tensor
    mean: Tensor
    log_variance: Tensor


def check_parameterisation(prediction: str, variance: str) -> None:
    """Raises ValueError for names that are none of `Prediction` and `ReverseVariance`."""
    for field, value, names in (
        ("prediction", prediction, get_args(Prediction)),
        ("variance", variance, get_args(ReverseVariance)),
    ):
        if value not in names:
            raise ValueError(f"{field}={value!r}: must be one of {', '.join(names)}")


def is_learned(variance: ReverseVariance) -> bool:
    """Whether the network gives the variance too."""
    return variance in ("learned", "learned-range")


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
    prediction: Prediction,
    variance: ReverseVariance,
    clip: bool,
) -> ReverseStep:
    """The reverse step that a network's output describes. Differentiable; everything is float32.

    output: (B, C or 2C, H, W), see `output_channels`; x_t: (B, C, H, W); t: (B,) int64 of `diffusion`.
    prediction: the first half is eps (equation 11 gives the mean), x_0, mu~ itself or v (Salimans and Ho 2022).
    variance: "small" beta~_t, "large" beta_t; "learned": the second half is log sigma^2 itself; "learned-range": it is
        v of Nichol and Dhariwal 2021, equation 15, which interpolates (v from -1 to 1, unbounded) between
        log beta~_t and log beta_t.
    clip: clamp x_0 to [-1, 1] and derive eps and the mean from it again. A mean that the network predicts itself
        ("mu") stays as it is, as in the authors' code.
    """
    channels = x_t.shape[1]
    expected = output_channels(channels, variance)
    if output.shape[1] != expected:
        raise ValueError(f"output: must have {expected} channels for variance={variance!r}, got {output.shape[1]}")
    predicted, spread = output.float().split([channels, expected - channels], dim=1)
    x_t = x_t.float()

    x0 = predicted
    if prediction == "eps":
        x0 = diffusion.predict_x0(x_t, t, predicted)
    elif prediction == "v":
        x0 = diffusion.x0_from_v(x_t, t, predicted)
    elif prediction == "mu":
        x0 = diffusion.x0_from_mu(x_t, t, predicted)
    if clip:
        x0 = x0.clamp(-1, 1)

    if prediction == "eps" and not clip:
        eps = predicted
    elif prediction == "v" and not clip:
        eps = diffusion.eps_from_v(x_t, t, predicted)
    else:
        eps = diffusion.predict_eps(x_t, t, x0)
    mean = predicted if prediction == "mu" else diffusion.posterior_mean(x0, x_t, t)
    log_variance = _log_variance(spread, t, diffusion, variance).expand_as(x_t)
    return ReverseStep(x0=x0, eps=eps, mean=mean, log_variance=log_variance)


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


class ReverseProcess:
    """A network together with what its output means.

    network: (x_t (B, C, H, W), t (B,) int64 of the chain it was trained on) -> (B, C or 2C, H, W); for samplers and
    evaluation it must be in eval mode. diffusion: its tables on the network's device; may be respaced.
    prediction and variance: see `interpret`. ValueError for other names.
    """

    def __init__(
        self,
        network: Network,
        diffusion: GaussianDiffusion,
        *,
        prediction: Prediction = "eps",
        variance: ReverseVariance,
    ) -> None:
        check_parameterisation(prediction, variance)
        self.network = network
        self.diffusion = diffusion
        self.prediction: Prediction = prediction
        self.variance: ReverseVariance = variance

    def step(self, x_t: Tensor, t: Tensor, *, clip: bool) -> ReverseStep:
        """Call the network at x_t (B, C, H, W) and t (B,) int64 of `diffusion`, and interpret its output."""
        return self.interpret(self.network(x_t, self.diffusion.original_t(t)), x_t, t, clip=clip)

    def interpret(self, output: Tensor, x_t: Tensor, t: Tensor, *, clip: bool) -> ReverseStep:
        """The reverse step that an output of the network describes: see the function of that name."""
        return interpret(
            output,
            x_t,
            t,
            diffusion=self.diffusion,
            prediction=self.prediction,
            variance=self.variance,
            clip=clip,
        )

    def respaced(self, steps: Tensor) -> "ReverseProcess":
        """The same network on the chain that visits only `steps` of this one: see `GaussianDiffusion.respaced`."""
        diffusion = self.diffusion.respaced(steps)
        return ReverseProcess(self.network, diffusion, prediction=self.prediction, variance=self.variance)
