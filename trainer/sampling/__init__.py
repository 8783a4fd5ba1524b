"""Samplers, guidance, and requests for samples: what is to be drawn, and a batch of it.

A sampler is a function of the type `trainer.diffusion.contract.Sampler`: a module of its own here, and a line in the
table of samplers.py. It sees a network only through a `Denoiser`, which guidance.py wraps.
"""
