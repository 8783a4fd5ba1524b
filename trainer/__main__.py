"""Says what there is: `python -m trainer`."""

import sys

COMMANDS = {
    "ddpm-prepare": ("data_prep", "images as they lie on disk -> verified tar shards"),
    "ddpm-init": ("trainer.init", "prepared data -> a commented configuration that suits it"),
    "ddpm-train": ("trainer.train", "train, or go on; --dry-run says what it will take"),
    "ddpm-launch": ("launch.launcher", "`accelerate launch` for the commands here: several processes or hosts"),
    "ddpm-sample": ("trainer.sample", "draw images from a trained run"),
    "ddpm-evaluate": ("trainer.evaluate", "bits/dim, FID, KID, IS, precision and recall, figures"),
    "ddpm-convert": ("trainer.convert", "weights to and from diffusers; averages of other widths"),
    "ddpm-status": ("launch.status", "how a run is doing, on one screen"),
    "ddpm-report": ("trainer.report", "a run as one HTML page"),
    "ddpm-checkpoint": ("trainer.checkpoint", "list, verify, inspect and compare checkpoints"),
    "ddpm-replay": ("trainer.replay", "compute a step again that was not finite"),
}
"""Console script: its module, whose `main` it calls, and what it does."""


def main() -> int:
    """Print the commands; exit code 2 where something else was asked for."""
    width = max(map(len, COMMANDS))
    modules = max(len(module) for module, _ in COMMANDS.values())
    lines = [f"  {name:<{width}}  python -m {module:<{modules}}  {what}" for name, (module, what) in COMMANDS.items()]
    print("Commands, each with --help, and the same without installation:\n")
    print("\n".join(lines))
    print("\nImages of your own: ddpm-prepare IMAGES DATA --size 64; ddpm-init DATA; ddpm-train --config DATA.toml")
    if len(sys.argv) > 1 and sys.argv[1] not in ("-h", "--help"):
        print(f"error: {sys.argv[1]}: give one of the commands above", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
