"""What a network is trained to minimise: the six objectives of Ho et al. 2020, table 2, and their successors."""

from typing import Literal, get_args

import torch
from torch import Tensor

from trainer.diffusion.likelihood import bound_bits
from trainer.diffusion.process import GaussianDiffusion
from trainer.diffusion.reverse import Prediction, ReverseVariance, check_parameterisation, interpret, is_learned

Loss = Literal["mse", "bound", "hybrid"]


class Objective:
    """A loss for each image.

    loss:
        "mse": the unweighted squared error of the prediction; of eps it is L_simple (equation 14), of mu it is
            ||mu~ - mu~_theta||^2.
        "bound": one term of equation 5 in bits per dimension, x_0 not clipped, as in the authors' code: its mean over
            uniform t, times T, is the bound less the prior.
        "hybrid": Nichol and Dhariwal 2021, equation 16: the squared error, plus the term of the bound times T / 1000
            (their 0.001 L_vlb) whose mean is cut off from the gradient, so that it teaches the variance alone.

    Table 2 is, row by row: mu with bound and learned variance, mu with bound and fixed variance, mu with mse; the same
    three for eps. A fixed variance is "small" or "large"; under mse the choice matters only to the sampler.

    ValueError for names that are not known, for hybrid without a learned-range variance, and for mse with a variance
    that is learned: it would get no gradient.
    """

    def __init__(
        self, diffusion: GaussianDiffusion, *, prediction: Prediction, variance: ReverseVariance, loss: Loss
    ) -> None:
        check_parameterisation(prediction, variance)
        if loss not in get_args(Loss):
            raise ValueError(f"loss={loss!r}: must be one of {', '.join(get_args(Loss))}")
        if loss == "mse" and is_learned(variance):
            raise ValueError(f"loss='mse': gives no gradient to variance={variance!r}; use 'small' or 'large'")
        if loss == "hybrid" and variance != "learned-range":
            raise ValueError(f"loss='hybrid': needs variance='learned-range', got {variance!r}")
        self.diffusion = diffusion
        self.prediction: Prediction = prediction
        self.variance: ReverseVariance = variance
        self.loss: Loss = loss

    def losses(self, output: Tensor, *, x0: Tensor, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The loss of each image: (B,) float32.

        output: the network's, (B, C or 2C, H, W), at x_t = q_sample(x0, t, eps); x0, x_t, eps: (B, C, H, W);
        t: (B,) int64 of the diffusion. No gradient flows into anything but the output.
        """
        if self.loss == "mse":
            return self._squared_error(output, x0, x_t, t, eps)
        if self.loss == "bound":
            return self._bound(output, x0, x_t, t)
        predicted, spread = output.split([x0.shape[1], x0.shape[1]], dim=1)
        bound = self._bound(torch.cat((predicted.detach(), spread), dim=1), x0, x_t, t)
        return self._squared_error(predicted, x0, x_t, t, eps) + self.diffusion.timesteps / 1000 * bound

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
            clip=False,
        )
        return bound_bits(step, x0, x_t, t, self.diffusion)
