"""Other trainers' steps, as their own programs take them, without reading data.

Each function is called in a process of its own and returns what takes `steps` steps of `config.train.global_batch`
images. What a peer does by default stays as it is; what is changed is said by the arguments.
"""

import ast
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from benchmarks.machine import synchronize
from benchmarks.turns import Run
from trainer.config import Config
from trainer.interop.diffusers_settings import unet_settings
from trainer.interop.supported import ddpm_sections, network_of


def diffusers_network(config: Config) -> Any:
    """The UNet2DModel that is the configuration's network."""
    from diffusers import UNet2DModel

    model, diffusion = ddpm_sections(config)
    return UNet2DModel.from_config(unet_settings(network_of(model, diffusion.variance)))


def diffusers_example(
    config: Config, *, steps: int, threads: int, channels_last: bool = False, compiled: bool = False
) -> Run:
    """examples/unconditional_image_generation/train_unconditional.py with --use_ema, TensorBoard and the learning rate
    it has by default; --mixed_precision is the configuration's. It updates a progress bar and logs after every step,
    for which it reads the loss from the device.
    """
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    mixed_precision = {"fp32": "no"}.get(config.train.precision, config.train.precision)
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        log_with="tensorboard",
        project_dir=tempfile.mkdtemp(prefix="diffusers-"),
        cpu=not torch.cuda.is_available(),
    )
    accelerator.init_trackers("train_unconditional")
    network = diffusers_network(config)
    ema = EMAModel(
        network.parameters(),
        decay=0.9999,
        use_ema_warmup=True,
        inv_gamma=1.0,
        power=3 / 4,
        model_cls=UNet2DModel,
        model_config=network.config,
    )
    if channels_last:
        network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    schedule = get_scheduler("cosine", optimizer=optimizer, num_warmup_steps=500, num_training_steps=100_000)
    network, optimizer, schedule = accelerator.prepare(network, optimizer, schedule)
    ema.to(accelerator.device)
    if compiled:
        network = torch.compile(network)
    timesteps = ddpm_sections(config)[1].timesteps
    noise_scheduler = DDPMScheduler(num_train_timesteps=timesteps)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    images = _images(config, accelerator.device) * 2 - 1
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    progress = tqdm(file=Path(os.devnull).open("w"))  # noqa: SIM115  # open as long as the process
    network.train()

    def step() -> None:
        clean = images.to(dtype)
        noise = torch.randn(clean.shape, dtype=dtype, device=clean.device)
        t = torch.randint(0, timesteps, (len(clean),), device=clean.device).long()
        noisy = noise_scheduler.add_noise(clean, noise, t)
        with accelerator.accumulate(network):
            loss = F.mse_loss(network(noisy, t).sample.float(), noise.float())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            ema.step(network.parameters())
            progress.update(1)
        logs = {"loss": loss.detach().item(), "lr": schedule.get_last_lr()[0], "ema_decay": ema.cur_decay_value}
        progress.set_postfix(**logs)
        accelerator.log(logs, step=progress.n)

    return _in_turns(step, config, steps=steps, threads=threads, device=accelerator.device)


def lucidrains_network(config: Config) -> nn.Module:
    """denoising-diffusion-pytorch's Unet with this width and these levels: another network, of another size.

    ModuleNotFoundError where the package is not installed.
    """
    model, _ = ddpm_sections(config)
    return _lucidrains().Unet(
        dim=model.base_channels,
        dim_mults=tuple(model.channel_multipliers),
        channels=model.channels,
        dropout=model.dropout,
        full_attn=tuple(
            model.image_size // 2**level in model.attention_resolutions
            for level in range(len(model.channel_multipliers))
        ),
    )


def lucidrains_trainer(config: Config, *, steps: int, threads: int) -> Run:
    """The loop of its Trainer.train with the optimizer and EMA of its defaults, the paper's schedule and objective."""
    from ema_pytorch import EMA

    mixed_precision = {"fp32": "no"}.get(config.train.precision, config.train.precision)
    accelerator = Accelerator(split_batches=True, mixed_precision=mixed_precision, cpu=not torch.cuda.is_available())
    diffusion = _lucidrains().GaussianDiffusion(
        lucidrains_network(config),
        image_size=config.model.image_size,
        timesteps=ddpm_sections(config)[1].timesteps,
        objective="pred_noise",
        beta_schedule="linear",
    )
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    ema = EMA(diffusion, beta=0.995, update_every=10)
    ema.to(accelerator.device)
    diffusion, optimizer = accelerator.prepare(diffusion, optimizer)
    images = _images(config, accelerator.device)
    progress = tqdm(file=Path(os.devnull).open("w"))  # noqa: SIM115  # open as long as the process

    def step() -> None:
        diffusion.train()
        with accelerator.autocast():
            loss = diffusion(images)
            total = loss.item()
        accelerator.backward(loss)
        progress.set_description(f"loss: {total:.4f}")
        accelerator.wait_for_everyone()
        accelerator.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.wait_for_everyone()
        ema.update()
        progress.update(1)

    return _in_turns(step, config, steps=steps, threads=threads, device=accelerator.device)


def _images(config: Config, device: torch.device) -> torch.Tensor:
    """A batch, float32 in [0, 1]."""
    model = config.model
    return torch.rand(config.train.global_batch, model.channels, model.image_size, model.image_size, device=device)


def _in_turns(step: Callable[[], None], config: Config, *, steps: int, threads: int, device: torch.device) -> Run:
    torch.set_num_threads(threads)

    def run() -> int:
        for _ in range(steps):
            step()
        synchronize(device)
        return steps * config.train.global_batch

    return run


def _lucidrains() -> ModuleType:
    """Its main module. Where torchvision is missing, which it needs for reading and writing image files only, the
    module is executed without that import; all other lines are as they are.
    """
    package, name = "denoising_diffusion_pytorch", "denoising_diffusion_pytorch.denoising_diffusion_pytorch"
    if name in sys.modules:
        return sys.modules[name]
    if importlib.util.find_spec("torchvision") is not None:
        return importlib.import_module(name)
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed", name=package)
    sys.modules[package] = importlib.util.module_from_spec(spec)  # not executed: it imports all of its modules
    path = Path(spec.submodule_search_locations[0]) / f"{package}.py"
    tree = ast.parse(path.read_text())
    tree.body = [line for line in tree.body if not (isinstance(line, ast.ImportFrom) and line.module == "torchvision")]
    module = ModuleType(name)
    sys.modules[name] = module
    exec(compile(tree, str(path), "exec"), module.__dict__)
    return module
