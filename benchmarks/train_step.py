"""One training step: ours beside the loop of diffusers' unconditional example, and beside the device's matmul peak.

    python benchmarks/train_step.py [--config configs/cifar10.toml] [--batch 4] [--precision fp32] [--steps 5]

Same network (equal in number and shape of parameters), batch, precision and device, in turns within one run. A step is
everything between two batches: noise, forward, backward, clipping, Adam and EMA. Reading data is left out of both.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel

from trainer.config import Config
from trainer.data.stream import BatchLayout
from trainer.engine.build import build_diffusion, build_network, build_state
from trainer.engine.cost import measure
from trainer.engine.precision import autocast
from trainer.engine.processes import make_accelerator
from trainer.engine.step import TrainStep
from trainer.engine.strategies import DataParallel, Strategy
from trainer.signals import StopRequest

Step = Callable[[], None]


def ours(config: Config, strategy: Strategy) -> Step:
    """The trainer's own step, with its guard, EMA and telemetry report."""
    state = build_state(config, strategy)
    layout = BatchLayout.plan(config.train.global_batch, 1, None)
    step = TrainStep(
        config=config,
        layout=layout,
        strategy=strategy,
        state=state,
        diffusion=build_diffusion(config, strategy.device),
        stop=StopRequest(),
    )
    model, batch = config.model, layout.global_batch
    images = torch.randint(0, 256, (batch, model.channels, model.image_size, model.image_size), dtype=torch.uint8)
    stream = ({"image": images, "position": torch.arange(first, first + batch)} for first in itertools.count(0, batch))

    def take() -> None:
        step.update(step.backward(stream)).read()
        state.updates += 1
        state.averages.update(state.updates)

    return take


def diffusers_example(config: Config) -> Step:
    """The loop of examples/unconditional_image_generation/train_unconditional.py, as it ships."""
    accelerator, model = make_accelerator(), config.model
    attention = [model.image_size // 2**level in model.attention_resolutions for level in range(_levels(config))]
    network = UNet2DModel(
        sample_size=model.image_size,
        in_channels=model.channels,
        out_channels=model.channels,
        layers_per_block=model.blocks_per_level,
        block_out_channels=[model.base_channels * multiplier for multiplier in model.channel_multipliers],
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)],
        dropout=model.dropout,
        attention_head_dim=None,
        norm_eps=1e-6,
        norm_num_groups=model.norm_groups,
        freq_shift=1,
        flip_sin_to_cos=False,
        downsample_padding=0,
    ).to(accelerator.device)
    ema = EMAModel(network.parameters(), decay=config.train.ema_decay, model_cls=UNet2DModel)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
    scheduler = DDPMScheduler(num_train_timesteps=config.diffusion.timesteps)
    network, optimizer = accelerator.prepare(network, optimizer)
    shape = (config.train.global_batch, model.channels, model.image_size, model.image_size)
    clean = torch.rand(shape, device=accelerator.device) * 2 - 1

    def take() -> None:
        noise = torch.randn(clean.shape, device=clean.device)
        t = torch.randint(0, config.diffusion.timesteps, (len(clean),), device=clean.device)
        with autocast(config.train.precision, clean.device):  # accelerate's, of the example's --mixed_precision
            prediction = network(scheduler.add_noise(clean, noise, t), t).sample.float()
        loss = torch.nn.functional.mse_loss(prediction, noise)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(network.parameters())
        loss.detach().item()  # as the example does for its progress bar

    return take


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product, the best of five."""
    side = 8192 if device.type == "cuda" else 1024
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / min(seconds(lambda: one @ other, device) for _ in range(5))


def seconds(action: Callable[[], object], device: torch.device) -> float:
    """Wall time of an action, its work on the device included."""
    _wait(device)
    started = time.perf_counter()
    action()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _levels(config: Config) -> int:
    return len(config.model.channel_multipliers)


def main() -> None:
    """Measure in turns, so that a machine that slows down slows both; print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/cifar10.toml"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/out/train_step.json"))
    arguments = parser.parse_args()
    batch = [f"train.global_batch={arguments.batch}", f"train.precision={arguments.precision}"]
    config = Config.load(arguments.config, batch)
    strategy = DataParallel(config.train)
    device = strategy.device

    contenders = {"ours": ours(config, strategy), "diffusers example": diffusers_example(config)}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(arguments.steps + 2):
        for name, take in contenders.items():
            spent = seconds(take, device)
            if round_ >= 2:  # the first two warm up
                times[name].append(spent)

    shape = (config.model.channels, config.model.image_size, config.model.image_size)
    flops = measure(lambda: build_network(config), shape, batch=1, bf16=False).training_flops_per_image
    peak = matmul_peak(device, torch.float32 if arguments.precision == "fp32" else torch.bfloat16)
    rates = {name: arguments.batch / statistics.median(spent) for name, spent in times.items()}
    rows = [
        {
            "name": name,
            "images_per_second": rate,
            "ratio": rate / rates["diffusers example"],
            "mfu": rate * flops / peak,
        }
        for name, rate in rates.items()
    ]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    about = f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(
        f"{arguments.config.stem}, batch {arguments.batch}, {arguments.precision}, median of {arguments.steps}; {about}"
    )
    print(f"{'':<20}{'images/s':>10}{'ratio':>8}{'of matmul peak':>16}")
    for row in rows:
        print(f"{row['name']:<20}{row['images_per_second']:>10.2f}{row['ratio']:>8.2f}{row['mfu']:>16.1%}")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"about": about, "arguments": vars(arguments), "rows": rows}, default=str))


if __name__ == "__main__":
    main()
