"""Drawing samples: one request, a table of samplers, and batches of images that do not depend on who draws them.

A sampler is a function of the type `trainer.diffusion.contract.Sampler`: a module of its own here, and a line in the
table of samplers.py. It sees a network only through a `Denoiser`, which guidance.py wraps.
"""
