"""The family "ddpm" from its section of the configuration."""

import torch

from trainer.config.families import DDPMConfig, GaussianConfig
from trainer.diffusion.ddpm.objective import GaussianObjective
from trainer.diffusion.ddpm.process import GaussianDiffusion
from trainer.diffusion.ddpm.reverse import output_channels
from trainer.diffusion.ddpm.schedules import make_betas
from trainer.diffusion.ddpm.timesteps import ImportanceSampling


def ddpm_diffusion(section: GaussianConfig, device: torch.device) -> GaussianDiffusion:
    """The forward process, its tables on the device."""
    betas = make_betas(section.schedule, section.timesteps, section.betas)
    return GaussianDiffusion(betas).to(device)


def ddpm_objective(section: DDPMConfig, device: torch.device) -> GaussianObjective:
    """The objective, its tables and its recorded state (importance sampling of t) on the device."""
    importance = section.timestep_sampling == "importance"
    return GaussianObjective(
        ddpm_diffusion(section, device),
        prediction=section.prediction,
        variance=section.variance,
        loss=section.loss,
        times=ImportanceSampling(section.timesteps, device) if importance else None,
    )


def ddpm_output_channels(section: DDPMConfig, channels: int) -> int:
    """Channels of the network's output: twice the image's where the variance is learned."""
    return output_channels(channels, section.variance)
