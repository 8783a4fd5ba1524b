"""Distributed trainer for denoising diffusion models."""

__version__ = "0.1.0"
