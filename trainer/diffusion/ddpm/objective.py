"""What a network is trained to minimise: the six objectives of Ho et al. 2020, table 2, and their successors."""

import math
from typing import get_args

import torch
from torch import Tensor

from trainer.config.families import Loss, PredictionKind, ReverseVariance, is_learned
from trainer.diffusion.contract import Batch, Conditioning, Losses, Network
from trainer.diffusion.ddpm.likelihood import BIN, bound_bits, normal_kl
from trainer.diffusion.ddpm.process import GaussianDiffusion
from trainer.diffusion.ddpm.respacing import kept_timesteps
from trainer.diffusion.ddpm.reverse import ReverseProcess, check_parameterisation, interpret
from trainer.diffusion.ddpm.timesteps import UniformTimesteps
from trainer.diffusion.keyed_noise import KeyedNoise
from trainer.diffusion.time_distribution import TimeDistribution


class GaussianObjective:
    """A loss for each image, on a discrete chain of Gaussian noise.

    loss:
        "mse": the unweighted squared error of the prediction; of eps it is L_simple (equation 14), of mu it is
            ||mu~ - mu~_theta||^2.
        "bound": one term of equation 5 in bits per dimension, x_0 not clipped, as in the authors' code: its mean over
            uniform t, times T, is the bound less the prior.
        "hybrid": Nichol and Dhariwal 2021, equation 16: the squared error, plus the term of the bound times T / 1000
            (their 0.001 L_vlb) whose mean is cut off from the gradient, so that it teaches the variance alone.

    Table 2 is, row by row: mu with bound and learned variance, mu with bound and fixed variance, mu with mse; the same
    three for eps. A fixed variance is "small" or "large"; under mse the choice matters only to the sampler.
    times: how t is drawn, by default uniformly.

    ValueError for names that are not known, for hybrid without a learned-range variance, and for mse with a variance
    that is learned: it would get no gradient.
    """

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        *,
        prediction: PredictionKind,
        variance: ReverseVariance,
        loss: Loss,
        times: TimeDistribution | None = None,
    ) -> None:
        check_parameterisation(prediction, variance)
        if loss not in get_args(Loss):
            raise ValueError(f"loss={loss!r}: must be one of {', '.join(get_args(Loss))}")
        if loss == "mse" and is_learned(variance):
            raise ValueError(f"loss='mse': gives no gradient to variance={variance!r}; use 'small' or 'large'")
        if loss == "hybrid" and variance != "learned-range":
            raise ValueError(f"loss='hybrid': needs variance='learned-range', got {variance!r}")
        self.diffusion = diffusion
        self.prediction: PredictionKind = prediction
        self.variance: ReverseVariance = variance
        self.loss: Loss = loss
        self.validation_times: TimeDistribution = UniformTimesteps(diffusion.timesteps)
        self.times: TimeDistribution = self.validation_times if times is None else times
        self.bound_terms: int | None = diffusion.timesteps
        self._in_bound = squared_error_in_bound(diffusion, prediction, variance) if loss == "mse" else None

    def training_losses(
        self, network: Network, batch: Batch, noise: KeyedNoise, *, times: TimeDistribution | None = None
    ) -> Losses:
        """Ho et al. 2020, algorithm 1, lines 2 to 5: draw t and eps, noise the images, predict, compare.

        network: at x_t (B, C, H, W) float32, t (B,) int64 of the diffusion and the batch's `cond`; noise: has "t" and
        "eps"; times: how t is drawn, in place of the objective's own way.
        """
        t, weight = (self.times if times is None else times).draw(noise)
        eps = noise.normal("eps", tuple(batch.x.shape[1:]))
        x_t = self.diffusion.q_sample(batch.x, t, eps)
        output = network(x_t, t, **batch.cond)
        loss, bound = self.losses_and_bound(output, x0=batch.x, x_t=x_t, t=t, eps=eps)
        return Losses(t=t, level=t.float() / self.diffusion.timesteps, loss=loss, weight=weight, bound=bound)

    def record(self, t: Tensor, losses: Tensor) -> None:
        """Implements `trainer.diffusion.contract.Objective.record`."""
        self.times.record(t, losses)

    def tensors(self) -> dict[str, Tensor]:
        """timesteps/history and timesteps/counts of importance sampling; none where t is uniform."""
        return {f"timesteps/{name}": tensor for name, tensor in self.times.tensors().items()}

    def denoiser(self, network: Network, cond: Conditioning | None = None, *, respacing: str = "all") -> ReverseProcess:
        """The reverse process that a network describes which was trained with this objective.

        respacing: the timesteps to keep, see `kept_timesteps`, which raises ValueError.
        """
        reverse = ReverseProcess(
            network, self.diffusion, prediction=self.prediction, variance=self.variance, cond=cond or {}
        )
        return reverse if respacing == "all" else reverse.respaced(kept_timesteps(self.diffusion.timesteps, respacing))

    def losses_and_bound(
        self, output: Tensor, *, x0: Tensor, x_t: Tensor, t: Tensor, eps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss of each image, and its term of equation 5 in bits per dimension: both (B,) float32.

        output: the network's, (B, C or 2C, H, W), at x_t = q_sample(x0, t, eps); x0, x_t, eps: (B, C, H, W);
        t: (B,) int64 of the diffusion. No gradient flows into anything but the output. The term has no gradient and
        costs nothing: it is computed anyway, or follows from the squared error, see `squared_error_in_bound`.
        """
        if self._in_bound is not None:
            weight, constant = self._in_bound
            squared_error = self._squared_error(output, x0, x_t, t, eps)
            return squared_error, weight[t] * squared_error.detach() + constant[t]
        if self.loss == "bound":
            bound = self._bound(output, x0, x_t, t)
            return bound, bound.detach()
        predicted, spread = output.split([x0.shape[1], x0.shape[1]], dim=1)
        bound = self._bound(torch.cat((predicted.detach(), spread), dim=1), x0, x_t, t)
        squared_error = self._squared_error(predicted, x0, x_t, t, eps)
        return squared_error + self.diffusion.timesteps / 1000 * bound, bound.detach()

    def _squared_error(self, predicted: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        target = eps
        if self.prediction == "x0":
            target = x0
        elif self.prediction == "mu":
            target = self.diffusion.posterior_mean(x0, x_t, t)
        elif self.prediction == "v":
            target = self.diffusion.v_target(x0, t, eps)
        return (target.float() - predicted.float()).square().mean(dim=(1, 2, 3))

    def _bound(self, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        step = interpret(
            output,
            x_t,
            t,
            diffusion=self.diffusion,
            prediction=self.prediction,
            variance=self.variance,
        )
        return bound_bits(step, x0, x_t, t, self.diffusion)


def squared_error_in_bound(
    diffusion: GaussianDiffusion, prediction: PredictionKind, variance: ReverseVariance
) -> tuple[Tensor, Tensor]:
    """What a squared error means for the bound: weight and constant, each (T,) float32, on the diffusion's device.

    weight_t mse_t + constant_t is the term at t of equation 5 in bits per dimension, x_0 not clipped. For t > 0 it is
    exact: KL(q || p) is ||mu~ - mu_theta||^2 / (2 sigma_t^2) (equation 8), in which the error of x_0 counts
    posterior_x0^2 (equation 7), that of eps (1 - abar) / abar of this (equation 12) and that of v (1 - abar); and a
    constant where sigma_t^2 is not beta~_t. At t = 0 the decoder's mass in a bin (equation 13) is taken for its
    density in the middle, times the bin's width.

    `variance` is "small" or "large", ValueError otherwise.
    """
    if variance not in ("small", "large"):
        raise ValueError(f"variance={variance!r}: what the network learns is in no squared error of its mean")
    all_t = torch.arange(diffusion.timesteps, device=diffusion.betas.device)
    true_log_variance = diffusion.posterior_log_variance(all_t, "small")
    log_variance = diffusion.posterior_log_variance(all_t, variance)
    of_mean = {
        "mu": torch.ones_like(diffusion.abar),
        "x0": diffusion.posterior_x0.square(),
        "eps": (diffusion.posterior_x0 * diffusion.sqrt_recip_abar_minus_one).square(),
        "v": (diffusion.posterior_x0 * diffusion.sqrt_one_minus_abar).square(),
    }[prediction]
    no_error = torch.zeros_like(log_variance)
    constant = normal_kl(no_error, true_log_variance, no_error, log_variance)
    decoder = 0.5 * (math.log(2 * math.pi) + log_variance) - math.log(2 * BIN)
    constant = torch.where(all_t == 0, decoder, constant)
    return 0.5 * of_mean * torch.exp(-log_variance) / math.log(2), constant / math.log(2)
