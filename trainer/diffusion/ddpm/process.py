"""The forward process q and its posterior (Ho et al. 2020, section 2). Equation numbers are that paper's.

Here t runs over 0..T-1: index t is the paper's t + 1. Images are (B, C, H, W), timesteps (B,) int64.
"""

from typing import Literal, Self

import torch
from einops import rearrange
from torch import Tensor

Variance = Literal["small", "large"]


class GaussianDiffusion:
    """q(x_t | x_0) and q(x_{t-1} | x_t, x_0) for a schedule of betas.

    The tables are computed in float64 and kept in float32: each is correctly rounded, where a float32 cumulative
    product would drift. Every method takes any floating dtype and returns float32, also under autocast: in
    bfloat16 abar = 0.9999 is 1, and the first timesteps would get no noise.

    It is no nn.Module on purpose: its tables belong in no state dict and in no average of weights.

    betas: (T,) float64 with T >= 2, each in (0, 1). original_timesteps: (T,) int64, the timesteps that the network
    was trained with, where the chain is a part of a longer one; by default 0..T-1. ValueError otherwise.
    """

    def __init__(self, betas: Tensor, original_timesteps: Tensor | None = None) -> None:
        if betas.dtype != torch.float64 or betas.ndim != 1 or len(betas) < 2:
            raise ValueError(f"betas: must be (T,) float64 with T >= 2, got {tuple(betas.shape)} {betas.dtype}")
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(f"betas: must lie in (0, 1), got {betas.min():g} to {betas.max():g}")
        if original_timesteps is None:
            original_timesteps = torch.arange(len(betas))
        if original_timesteps.shape != betas.shape or original_timesteps.dtype != torch.int64:
            raise ValueError(f"original_timesteps: must be ({len(betas)},) int64, one for each beta")

        betas = betas.cpu()
        abar = torch.cumprod(1 - betas, dim=0)
        abar_prev = torch.cat((abar.new_ones(1), abar[:-1]))
        beta_tilde = betas * (1 - abar_prev) / (1 - abar)  # equation 7; beta~_0 = 0
        posterior_x0 = betas * abar_prev.sqrt() / (1 - abar)
        posterior_x_t = (1 - betas).sqrt() * (1 - abar_prev) / (1 - abar)
        # log(beta~_0) would be -inf; the authors put beta~_1 there, in both choices of the variance.
        log_beta_tilde = torch.cat((beta_tilde[1:2], beta_tilde[1:])).log()
        log_beta_clipped = torch.cat((beta_tilde[1:2], betas[1:])).log()

        self.abar64 = abar  # float64, on the CPU: for numbers that are made once a step, or from ratios
        self.original_timesteps = original_timesteps
        self.betas = betas.float()
        self.abar = abar.float()
        self.sqrt_abar = abar.sqrt().float()
        self.sqrt_one_minus_abar = (1 - abar).sqrt().float()
        self.sqrt_recip_abar = (1 / abar).sqrt().float()
        self.sqrt_recip_abar_minus_one = (1 / abar - 1).sqrt().float()
        self.posterior_x0 = posterior_x0.float()
        self.posterior_x_t = posterior_x_t.float()
        self.recip_posterior_x0 = (1 / posterior_x0).float()
        self.posterior_ratio = (posterior_x_t / posterior_x0).float()
        self.log_beta_tilde = log_beta_tilde.float()
        self.log_beta_clipped = log_beta_clipped.float()
        self.log_beta = betas.log().float()

    @property
    def timesteps(self) -> int:
        """T."""
        return len(self.betas)

    def to(self, device: torch.device | str) -> Self:
        """Moves the tables to `device`, in place, and returns self. `abar64` stays on the CPU."""
        for name, table in list(vars(self).items()):
            if name != "abar64":
                setattr(self, name, table.to(device))
        return self

    def respaced(self, steps: Tensor) -> "GaussianDiffusion":
        """The chain that visits only `steps` of this one (Nichol and Dhariwal 2021, section 4), on the same device.

        abar stays what it was at each kept step, so beta_s = 1 - abar_s / abar_{s-1}, where s-1 is the kept step
        before; `original_t` gives the timestep that the network was trained with.
        steps: (S,) int64, increasing, in [0, T), S >= 2; ValueError otherwise.
        """
        if steps.dtype != torch.int64 or steps.ndim != 1 or len(steps) < 2:
            raise ValueError(f"steps: must be (S,) int64 with S >= 2, got {tuple(steps.shape)} {steps.dtype}")
        steps = steps.cpu()
        if steps[0] < 0 or steps[-1] >= self.timesteps or not bool((steps.diff() > 0).all()):
            raise ValueError(f"steps: must increase within 0..{self.timesteps - 1}, got {steps.tolist()}")
        abar = self.abar64[steps]
        betas = 1 - abar / torch.cat((abar.new_ones(1), abar[:-1]))
        original = self.original_timesteps
        return GaussianDiffusion(betas, original.cpu()[steps]).to(original.device)

    def original_t(self, t: Tensor) -> Tensor:
        """The timestep that the network takes: (B,) int64 -> (B,) int64. It is t itself in a whole chain."""
        return self.original_timesteps[t]

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Equation 4: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps. x0 and eps: (B, C, H, W). Returns the same."""
        return _at(self.sqrt_abar, t) * x0.float() + _at(self.sqrt_one_minus_abar, t) * eps.float()

    def predict_x0(self, x_t: Tensor, t: Tensor, eps_hat: Tensor) -> Tensor:
        """Equation 15: x0_hat = (x_t - sqrt(1 - abar_t) eps_hat) / sqrt(abar_t), not clamped."""
        return _at(self.sqrt_recip_abar, t) * x_t.float() - _at(self.sqrt_recip_abar_minus_one, t) * eps_hat.float()

    def predict_eps(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """Equation 15 solved for the noise: eps = (x_t - sqrt(abar_t) x_0) / sqrt(1 - abar_t)."""
        return (x_t.float() - _at(self.sqrt_abar, t) * x0.float()) / _at(self.sqrt_one_minus_abar, t)

    def v_target(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Salimans and Ho 2022, section 4: v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0."""
        return _at(self.sqrt_abar, t) * eps.float() - _at(self.sqrt_one_minus_abar, t) * x0.float()

    def x0_from_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """Salimans and Ho 2022, appendix D: x_0 = sqrt(abar_t) x_t - sqrt(1 - abar_t) v."""
        return _at(self.sqrt_abar, t) * x_t.float() - _at(self.sqrt_one_minus_abar, t) * v.float()

    def eps_from_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """The noise that goes with `x0_from_v`: eps = sqrt(1 - abar_t) x_t + sqrt(abar_t) v."""
        return _at(self.sqrt_one_minus_abar, t) * x_t.float() + _at(self.sqrt_abar, t) * v.float()

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Equation 7: mu~ = [sqrt(abar_{t-1}) beta_t x_0 + sqrt(1 - beta_t) (1 - abar_{t-1}) x_t] / (1 - abar_t).

        At t = 0 it is x0.
        """
        return _at(self.posterior_x0, t) * x0.float() + _at(self.posterior_x_t, t) * x_t.float()

    def x0_from_mu(self, x_t: Tensor, t: Tensor, mu: Tensor) -> Tensor:
        """Equation 7 solved for x_0. At the end of the chain it magnifies errors of mu by 1 / 1.3e-4."""
        return _at(self.recip_posterior_x0, t) * mu.float() - _at(self.posterior_ratio, t) * x_t.float()

    def posterior_log_variance(self, t: Tensor, variance: Variance) -> Tensor:
        """Section 3.2: log sigma_t^2, of beta~_t ("small") or beta_t ("large"); at t = 0 both are beta~_1. (B,)."""
        return {"small": self.log_beta_tilde, "large": self.log_beta_clipped}[variance][t]


def _at(table: Tensor, t: Tensor) -> Tensor:
    """The table's entry for each sample, made to broadcast over images: (T,), (B,) -> (B, 1, 1, 1)."""
    return rearrange(table[t], "b -> b 1 1 1")
