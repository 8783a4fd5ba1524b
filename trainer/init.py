"""Write a configuration for prepared data: `ddpm-init data/photos`.

Network, batch, learning rate and the rest are chosen by the size and number of the images, from the settings of the
papers at the nearest size; each line of the file says where its value is from.
"""

import argparse
import shlex
import sys
from pathlib import Path

import torch

from trainer.config.shipped import first_comment, shipped
from trainer.errors import ConfigError, exit_clearly
from trainer.starting.recipe import recipe
from trainer.starting.source import open_prepared
from trainer.starting.template import as_toml, literal


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", metavar="DATA", help="a folder that ddpm-prepare has written")
    parser.add_argument("--out", type=Path, metavar="TOML", help="the file to write (default: NAME.toml, DATA's name)")
    parser.add_argument("--run-dir", type=Path, metavar="RUN", help="the run's folder (default: runs/NAME)")
    parser.add_argument(
        "--for",
        dest="device",
        choices=["gpu", "cpu"],
        help="gpu: as the papers trained, hours to days; cpu: a small network, in minutes (default: what is here)",
    )
    parser.add_argument("--list", action="store_true", help="list the configurations of papers that --config takes")
    arguments = parser.parse_args()
    if arguments.list == (arguments.data is not None):
        parser.error("give either DATA or --list")
    return arguments


@exit_clearly
def main() -> int:
    """Look, choose, write, and say what comes next."""
    arguments = parse_arguments()
    if arguments.list:
        for name, path in shipped().items():
            print(f"{name:<22} {first_comment(path)}")
        return 0
    manifest = open_prepared(arguments.data)
    device = arguments.device or ("gpu" if torch.cuda.is_available() else "cpu")
    settings = recipe(
        image_size=manifest.image_size, channels=manifest.channels, images=manifest.samples, gpu=device == "gpu"
    )
    name = arguments.data.resolve().name
    out = arguments.out or Path(f"{name}.toml")
    what = f"{manifest.samples:,} images of {manifest.image_size} x {manifest.image_size}, {manifest.mode}"
    other = "gpu" if device == "cpu" else "cpu"
    about = [
        f"{what}, in {literal(str(arguments.data))}.",
        f"Written by ddpm-init for a {device.upper()}; `--for {other}` writes another.",
        "Fields that are left out have defaults: trainer/config/sections.py.",
    ]
    text = as_toml(settings, run_dir=arguments.run_dir or Path("runs") / name, data=arguments.data, about=about)
    _write(out, text)
    print(f"{out}: for {what}, on a {device.upper()}; look through it, then")
    print(f"  {shlex.join(['ddpm-train', '--config', str(out), '--dry-run'])}   # what it will take")
    print(f"  {shlex.join(['ddpm-train', '--config', str(out)])}")
    return 0


def _write(out: Path, text: str) -> None:
    try:
        encoded = text.encode()
        with out.open("xb") as stream:
            stream.write(encoded)
    except FileExistsError as error:
        raise ConfigError(f"{out}: is there already; give another name with --out") from error
    except (OSError, UnicodeEncodeError) as error:
        raise ConfigError(f"{out}: cannot be written ({error})") from error


if __name__ == "__main__":
    sys.exit(main())
