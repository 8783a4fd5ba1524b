"""Random networks that hide nothing, and the same networks as diffusers builds them."""

from pathlib import Path

import torch
from diffusers import UNet2DModel
from torch import nn

from tests.harness import CONFIG
from trainer.config import Config, DDPMUNetConfig
from trainer.data.training_data import DATA_FINGERPRINT
from trainer.engine.build import build_state
from trainer.engine.checkpointing.checkpoints import Checkpoints
from trainer.engine.network.build import build_network
from trainer.engine.run_folder import RunFolder, identity
from trainer.engine.strategies import DataParallel


def randomise(model: nn.Module, seed: int = 0) -> None:
    """No layer near zero, no bias at zero, no norm at one, outputs of order one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(noise * 0.2)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)


def reference(config: DDPMUNetConfig, **wrong: object) -> UNet2DModel:
    """diffusers' network of that shape, with the settings of the published DDPM models but for `wrong`."""
    attention = [side in config.attention_resolutions for side in config.level_resolutions]
    settings = {
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "downsample_padding": 0,
        "attention_head_dim": None,
        "norm_eps": 1e-6,
        "norm_num_groups": config.norm_groups,
        "layers_per_block": config.blocks_per_level,
        "act_fn": "silu",
    }
    return UNet2DModel(
        sample_size=config.image_size,
        block_out_channels=config.level_channels,
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)],
        **(settings | wrong),
    ).eval()


def make_run(folder: Path, *overrides: str) -> tuple[Path, Config]:
    """A run's folder with one checkpoint, of step 3, whose raw and averaged weights are random and differ."""
    path = folder / "run"
    text = folder / "run.toml"
    text.write_text(CONFIG.replace("RUN_DIR", str(path)).replace("DATA", "nowhere"))
    config = Config.load(text, overrides)
    strategy = DataParallel(config.train)
    state = build_state(config, strategy)
    average = build_network(config)
    randomise(average, seed=2)
    state.main.set_weights(average.state_dict())
    randomise(state.main.network.module, seed=1)
    state.position = 3 * config.train.global_batch
    run = RunFolder(path, writes=True)
    path.mkdir()
    run.begin(config)
    trained = {**identity(config, None), DATA_FINGERPRINT: "f" * 64, "seed": config.seed}
    Checkpoints(run.checkpoints, strategy.accelerator).save(state.contents(), step=3, identity=trained)
    return path, config
