"""Drawing samples: one request, a table of samplers, and a trained run drawn from by all ranks.

A sampler is a function of the type `trainer.diffusion.contract.Sampler`: a module of its own here, and a line in the
table of samplers.py. It sees a network only through a `Denoiser`, which guidance.py wraps. Samplers and requests know
nothing of the engine; trained.py, guides.py, work.py, outputs.py and draw.py stand on it.
"""
