"""Weights in and out.

python trainer/convert.py export --run runs/lsun256 --out exported
python trainer/convert.py import exported --out runs/imported
python trainer/convert.py average --run runs/lsun256 --sigma-rel 0.12 --out runs/lsun256-0.12
"""

import sys
from pathlib import Path

if not __package__:  # run by path, Python looks in trainer/ first, where a module could shadow a library
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import re
import shlex

from trainer.arguments import WEIGHTS_HELP, at_least_one, weights_name, width
from trainer.errors import exit_clearly
from trainer.interop.average import average
from trainer.interop.export import ExportRequest, export
from trainer.interop.import_weights import import_weights


def license_identifier(text: str) -> str:
    """A name such as apache-2.0, as the Hugging Face Hub lists them."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: should be an identifier such as apache-2.0 or cc-by-4.0")
    return text


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    out = commands.add_parser("export", help="write a folder for diffusers, or, of ADM, for guided-diffusion")
    out.add_argument("--run", type=Path, required=True, metavar="RUN", help="the run's folder")
    out.add_argument("--checkpoint", type=Path, metavar="PATH", help="default: the newest that verifies")
    out.add_argument("--weights", type=weights_name, default="ema", metavar="NAME", help=WEIGHTS_HELP)
    out.add_argument("--out", type=Path, required=True, metavar="DIR", help="must not exist yet")
    out.add_argument(
        "--license", type=license_identifier, metavar="NAME", help="of the weights, for the model card: apache-2.0, ..."
    )
    out.add_argument(
        "--grid", type=Path, metavar="PNG", help="samples for the model card (default: the newest drawn while training)"
    )
    out.add_argument(
        "--push-to-hub",
        dest="hub",
        metavar="NAME",
        help="upload the folder to that repository of the Hugging Face Hub, as `hf auth login` or HF_TOKEN permit",
    )

    into = commands.add_parser("import", help="make a run's folder, to draw from or to train further")
    into.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="a diffusers DDPM folder; a state dict in the layout of pytorch_diffusion (the authors' weights), or of "
        "guided-diffusion (ADM), which needs --config; a run's folder or one of its checkpoints",
    )
    into.add_argument("--out", type=Path, required=True, metavar="RUN", help="must not exist yet")
    into.add_argument(
        "--config",
        type=Path,
        metavar="TOML",
        help="how to train further: a run's configuration of the same network; run_dir becomes --out",
    )
    into.add_argument(
        "--set", action="append", default=[], metavar="SECTION.NAME=VALUE", help="override one field; may be repeated"
    )
    into.add_argument("--weights", type=weights_name, metavar="NAME", help=f"of a run or checkpoint: {WEIGHTS_HELP}")
    into.add_argument(
        "--image-size",
        type=at_least_one,
        metavar="N",
        help="of a state dict: side of the images (default: 16 x 16 is where its one level of attention is)",
    )

    mean = commands.add_parser("average", help="make a run's folder with an average of any width, to draw from")
    mean.add_argument("--run", type=Path, required=True, metavar="RUN", help="trained with train.ema_snapshots")
    mean.add_argument(
        "--sigma-rel", type=width, required=True, metavar="W", help="the width, as a fraction of the run: 0.12"
    )
    mean.add_argument("--step", type=int, metavar="N", help="as of that snapshot (default: the newest)")
    mean.add_argument("--out", type=Path, required=True, metavar="DIR", help="must not exist yet")
    return parser.parse_args()


@exit_clearly
def main() -> int:
    """Parse, wire, run."""
    arguments = parse_arguments()
    if arguments.command == "export":
        command = shlex.join(["python", "trainer/convert.py", *sys.argv[1:]])
        fields = {
            name: getattr(arguments, name) for name in ("run", "checkpoint", "weights", "out", "license", "grid", "hub")
        }
        export(ExportRequest(**fields, command=command))
    elif arguments.command == "average":
        average(arguments.run, sigma_rel=arguments.sigma_rel, step=arguments.step, out=arguments.out)
    else:
        import_weights(
            arguments.source,
            out=arguments.out,
            config_path=arguments.config,
            overrides=arguments.set,
            weights=arguments.weights,
            image_size=arguments.image_size,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
