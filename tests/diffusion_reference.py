"""The papers' equations once more, in float64 and by other routes than the code's, for tests to compare with."""

import math

import torch
from torch import Tensor

LOG_LEAST = math.log(1e-12)


class Reference:
    """The forward process of (T,) betas, in plain float64. t is an int from 0."""

    def __init__(self, betas: list[float]) -> None:
        self.betas = betas
        self.abars = [math.prod(1 - beta for beta in betas[: t + 1]) for t in range(len(betas))]

    def abar(self, t: int) -> float:
        return self.abars[t] if t >= 0 else 1.0

    def beta_tilde(self, t: int) -> float:
        """The posterior's variance as that of a product of Gaussians: precisions add up."""
        if t == 0:
            return 0.0
        return 1 / ((1 - self.betas[t]) / self.betas[t] + 1 / (1 - self.abar(t - 1)))

    def mu_tilde(self, x0: Tensor, x_t: Tensor, t: int) -> Tensor:
        """The posterior's mean: precision-weighted mean of x_t / sqrt(alpha) and of sqrt(abar_{t-1}) x_0."""
        if t == 0:
            return x0
        alpha, abar = 1 - self.betas[t], self.abar(t - 1)
        weighted = math.sqrt(alpha) * x_t / self.betas[t] + math.sqrt(abar) * x0 / (1 - abar)
        return weighted * self.beta_tilde(t)

    def log_variance(self, t: int, variance: str) -> float:
        if t == 0:
            return math.log(self.beta_tilde(1))
        return math.log(self.betas[t] if variance == "large" else self.beta_tilde(t))

    def x_t(self, x0: Tensor, eps: Tensor, t: int) -> Tensor:
        return math.sqrt(self.abar(t)) * x0 + math.sqrt(1 - self.abar(t)) * eps

    def target(self, prediction: str, x0: Tensor, eps: Tensor, t: int) -> Tensor:
        a, s = math.sqrt(self.abar(t)), math.sqrt(1 - self.abar(t))
        x_t = self.x_t(x0, eps, t)
        return {"eps": eps, "x0": x0, "v": a * eps - s * x0, "mu": self.mu_tilde(x0, x_t, t)}[prediction]

    def x0_of(self, prediction: str, output: Tensor, x_t: Tensor, t: int) -> Tensor:
        """x_0, from solving the definition of each prediction together with equation 4."""
        a, s = math.sqrt(self.abar(t)), math.sqrt(1 - self.abar(t))
        if prediction == "x0":
            return output
        if prediction == "eps":
            return (x_t - s * output) / a
        if prediction == "v":  # v = a eps - s x0 and x_t = a x0 + s eps, a^2 + s^2 = 1
            return a * x_t - s * output
        return self.x0_of_mu(output, x_t, t)

    def x0_of_mu(self, mu: Tensor, x_t: Tensor, t: int) -> Tensor:
        """mu~ is affine in x_0: its value at 0 and its slope."""
        at_zero = self.mu_tilde(torch.zeros_like(x_t), x_t, t)
        slope = self.mu_tilde(torch.ones_like(x_t), x_t, t) - at_zero
        return (mu - at_zero) / slope

    def reverse(
        self, prediction: str, variance: str, output: Tensor, x_t: Tensor, t: int, clip: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x0, eps, mean and log variance of p(x_{t-1} | x_t). output: (C or 2C, H, W) float64."""
        channels = len(x_t)
        predicted, spread = output[:channels], output[channels:]
        x0 = self.x0_of(prediction, predicted, x_t, t)
        if clip:
            x0 = x0.clamp(-1, 1)
        eps = (x_t - math.sqrt(self.abar(t)) * x0) / math.sqrt(1 - self.abar(t))
        mean = predicted if prediction == "mu" else self.mu_tilde(x0, x_t, t)
        if variance == "learned":
            log_variance = spread
        elif variance == "learned-range":
            low, high = self.log_variance(t, "small"), math.log(self.betas[t])
            log_variance = (spread + 1) / 2 * high + (1 - spread) / 2 * low
        else:
            log_variance = torch.full_like(x_t, self.log_variance(t, variance))
        return x0, eps, mean, log_variance

    def bound_bits(self, x0: Tensor, x_t: Tensor, t: int, mean: Tensor, log_variance: Tensor) -> Tensor:
        """L_t of one image, bits per dimension."""
        if t == 0:
            return decoder_nll(x0, mean, (0.5 * log_variance).exp()).mean() / math.log(2)
        ours = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
        true = torch.distributions.Normal(self.mu_tilde(x0, x_t, t), math.sqrt(self.beta_tilde(t)))
        return torch.distributions.kl_divergence(true, ours).mean() / math.log(2)


def decoder_nll(x0: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Equation 13 in nats for each element, by complementary error functions, so that no tail cancels."""
    a, b = (x0 - 1 / 255 - mean) / scale, (x0 + 1 / 255 - mean) / scale
    tail = lambda z: 0.5 * torch.special.erfc(z / math.sqrt(2))  # noqa: E731  P(Z > z)
    inner = torch.where(a + b > 0, tail(a) - tail(b), tail(-b) - tail(-a))
    mass = torch.where(x0 < -0.999, tail(-b), torch.where(x0 > 0.999, tail(a), inner))
    return -mass.clamp(min=1e-12).log()


def linear(timesteps: int = 1000) -> Reference:
    """The paper's schedule."""
    return Reference([1e-4 + (0.02 - 1e-4) * i / (timesteps - 1) for i in range(timesteps)])


def images(seed: int, count: int, shape: tuple[int, ...] = (3, 4, 4)) -> Tensor:
    """Images of 8-bit values as float32 in [-1, 1], with both end values among them."""
    values = torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(seed))
    values[:, 0, 0, 0], values[:, 0, 0, 1] = 0, 255
    return values / 127.5 - 1


def normal(seed: int, *shape: int) -> Tensor:
    """float32 standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
