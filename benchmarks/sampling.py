"""Drawing images: ours beside diffusers' pipelines, the same weights in both.

    python benchmarks/sampling.py                                       # a size that fits the device
    python benchmarks/sampling.py --config configs/cifar10.toml --batch 64 --ddpm-steps 1000 --ddim-steps 50

The network's random weights go to diffusers as `convert.py export` writes them. First both draw from the same noise:
the table gives the largest difference of a pixel, of 255. Then they take turns, each in a process of its own
(turns.py), at equal steps: DDPMPipeline and DDIMPipeline as they ship, from float32 weights, or loaded in bfloat16;
ours from float32 weights, with bfloat16 by autocast. The limit is what the network's FLOPs take at the device's
measured peak.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from torch import Tensor

from benchmarks.machine import DTYPES, add_setting, default_device, describe, peak_limit, usual_precisions
from benchmarks.peers import diffusers_network
from benchmarks.turns import Clock, Contender, Run, Turn, result, take_turns
from trainer.config import Config
from trainer.diffusion.ddpm.respacing import kept_timesteps
from trainer.diffusion.keyed_noise import KeyedNoise, Stream, keyed_normal
from trainer.engine.build import build_objective, build_trained
from trainer.engine.network.build import build_network
from trainer.engine.network.cost import cost_of
from trainer.interop.diffusers_settings import scheduler_settings
from trainer.interop.layouts import DIFFUSERS, to_layout
from trainer.interop.supported import ddpm_sections, network_of
from trainer.models.backbones import example_inputs
from trainer.sampling.request import SamplingRequest

SEED = 0


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is drawn. `overrides` are of `config`; `sampler` is "ddpm" or "ddim", `steps` a divisor of its timesteps."""

    config: Path
    overrides: tuple[str, ...]
    sampler: str
    steps: int
    batch: int
    threads: int

    def load(self, precision: str) -> Config:
        """The configuration in that precision."""
        return Config.load(self.config, [*self.overrides, f"train.precision={precision}"])


def weights(config: Config) -> dict[str, Tensor]:
    """Random ones that hide nothing: a network that is not trained yet gives 0, whatever it does."""
    generator = torch.Generator().manual_seed(SEED)
    state = build_network(config).state_dict()
    for name, tensor in state.items():
        noise = torch.randn(tensor.shape, generator=generator)
        state[name] = tensor + 0.2 * noise if tensor.ndim == 1 else noise / tensor[0].numel() ** 0.5
    return state


def our_draw(setting: Setting, precision: str) -> Callable[[], Tensor]:
    """Our sampler over the timesteps that the pipelines visit; gives (B, C, H, W) uint8."""
    config, device = setting.load(precision), default_device()
    network = build_trained(config, weights(config), device)
    request = SamplingRequest(
        sampler=setting.sampler, respacing=f"ddim{setting.steps}", count=setting.batch, seed=SEED, batch=setting.batch
    )
    denoiser = build_objective(config, device).denoiser(network, respacing=request.respacing)
    model = config.model
    shape = model.image_shape

    def draw() -> Tensor:
        drawn = request.draw(denoiser, range(setting.batch), shape=shape)
        return torch.from_numpy(drawn)

    return draw


def pipeline_draw(setting: Setting, precision: str) -> Callable[[], Tensor]:
    """DDPMPipeline or DDIMPipeline with the same weights; gives (B, C, H, W) uint8."""
    config, device = setting.load(precision), default_device()
    network = diffusers_network(config)
    model, diffusion = ddpm_sections(config)
    unet = network_of(model, diffusion.variance)
    network.load_state_dict(to_layout(weights(config), unet, DIFFUSERS))
    pipeline_class, scheduler_class = {"ddpm": (DDPMPipeline, DDPMScheduler), "ddim": (DDIMPipeline, DDIMScheduler)}[
        setting.sampler
    ]
    scheduler = scheduler_class.from_config(scheduler_settings(diffusion))
    network = network.eval().to(dtype=DTYPES[precision])  # as from_pretrained's torch_dtype
    pipeline = pipeline_class(network, scheduler).to(device)
    pipeline.set_progress_bar_config(disable=True)
    # DDIM derives eps anew from the clipped x_0, as the authors' sampling does and ours.
    options = {"use_clipped_model_output": True} if setting.sampler == "ddim" else {}

    def draw() -> Tensor:
        images = pipeline(setting.batch, num_inference_steps=setting.steps, output_type="pt", **options).images
        return (images.float() * 255).round().to(torch.uint8).cpu()

    return draw


DRAWERS = {"ours": our_draw, "diffusers": pipeline_draw}


def in_turns(drawer: str, setting: Setting, precision: str) -> Run:
    """A contender: draws one batch in a turn."""
    draw = DRAWERS[drawer](setting, precision)
    torch.set_num_threads(setting.threads)

    def run() -> int:
        return len(draw())

    return run


def largest_difference(setting: Setting) -> int:
    """Of a pixel, in 255ths, between both sides' float32 images from the same noise."""
    config, device = setting.load("fp32"), default_device()
    model, index = config.model, torch.arange(setting.batch, device=device)
    shape = model.image_shape
    visited = kept_timesteps(ddpm_sections(config)[1].timesteps, f"ddim{setting.steps}").tolist()

    def noises() -> Iterator[Tensor]:
        yield KeyedNoise.sampling(SEED, index).normal("initial", shape)
        for t in reversed(visited[1:]):
            yield keyed_normal(SEED, Stream.ANCESTRAL, index, shape, sub=t)

    mine, noise = our_draw(setting, "fp32")(), noises()
    places = ("pipelines.ddpm.pipeline_ddpm", "pipelines.ddim.pipeline_ddim", "schedulers.scheduling_ddpm")
    theirs_draw = pipeline_draw(setting, "fp32")
    with ExitStack() as patches:
        for place in places:
            patches.enter_context(mock.patch(f"diffusers.{place}.randn_tensor", side_effect=noise))
        theirs = theirs_draw()
    return int((mine.int() - theirs.int()).abs().max())


def measure_sampler(setting: Setting, precisions: list[str], rounds: int, clock: Clock) -> list[dict[str, Any]]:
    """The rows of one sampler."""
    contenders = {
        f"{drawer}, {precision}": Contender(make=in_turns, arguments=(drawer, setting, precision))
        for precision in precisions
        for drawer in ("diffusers", "ours")
    }
    limits = {
        f"peak, {precision}": Contender(make=peak_limit, arguments=(precision, setting.threads))
        for precision in precisions
    }
    turns = take_turns(contenders | limits, rounds=rounds)
    difference = largest_difference(setting)
    config = setting.load(precisions[0])
    inputs = partial(example_inputs, config.model)
    flops = setting.steps * cost_of(lambda: build_network(config), inputs).forward_flops
    table = []
    for name in contenders:
        precision = name.rpartition(", ")[2]
        found = result(name, turns[name], turns[f"diffusers, {precision}"], clock=clock)
        table.append(
            {
                "sampler": setting.sampler,
                "steps": setting.steps,
                **asdict(found),
                "of_peak": flops * _rate(turns[name], clock) / _rate(turns[f"peak, {precision}"], clock),
                "largest_difference": difference if precision == "fp32" else None,
            }
        )
    return table


def _rate(turns: list[Turn], clock: Clock) -> float:
    """The highest: of a limit and of what is held against it, the turn that other work disturbed least."""
    return max(turn.images / getattr(turn, clock) for turn in turns)


def print_table(table: list[dict[str, Any]], head: str) -> None:
    """For a person."""
    print(head)
    print(f"{'':<28}{'images/s':>10}{'/ diffusers':>13}{'':<14}{'of peak':>9}{'pixels differ by':>18}")
    for row in table:
        difference = "" if row["largest_difference"] is None else f"{row['largest_difference']} of 255"
        name = f"{row['sampler']} {row['steps']}, {row['name']}"
        print(
            f"{name:<28}{row['per_second']:>10.3f}{row['ratio']:>13.2f}  "
            f"{row['lowest_ratio']:.2f} to {row['highest_ratio']:.2f}{row['of_peak']:>9.1%}{difference:>18}"
        )


def main() -> None:
    """Measure, print a table, write JSON."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setting(parser)
    parser.add_argument("--batch", type=int, default=256 if on_gpu else 16)
    parser.add_argument("--ddpm-steps", type=int, default=1000 if on_gpu else 20, help="a divisor of the timesteps")
    parser.add_argument("--ddim-steps", type=int, default=50 if on_gpu else 10, help="a divisor of the timesteps")
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=usual_precisions())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=["cpu", "wall"], default="wall", help="of ratios")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/out/sampling.json"))
    arguments = parser.parse_args()
    setting = Setting(
        config=arguments.config,
        overrides=tuple(arguments.overrides),
        sampler="ddpm",
        steps=arguments.ddpm_steps,
        batch=arguments.batch,
        threads=arguments.threads,
    )
    table = measure_sampler(setting, arguments.precisions, arguments.rounds, arguments.clock)
    setting = replace(setting, sampler="ddim", steps=arguments.ddim_steps)
    table += measure_sampler(setting, arguments.precisions, arguments.rounds, arguments.clock)
    about = describe(default_device(), arguments.threads, "diffusers")
    head = f"{arguments.config.stem}, batch {arguments.batch}, {arguments.rounds} rounds, "
    print_table(table, f"{head}ratios by {arguments.clock} time; {about}")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    content = {"about": about, "arguments": vars(arguments), "rows": table}
    arguments.json.write_text(json.dumps(content, default=str, indent=1) + "\n")


if __name__ == "__main__":
    main()
