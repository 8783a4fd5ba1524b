"""Judge a trained run: `python trainer/evaluate.py bpd --run runs/demo`.

bpd               variational bound in bits/dim, every term of it, rate and distortion (tables 1 and 4, figure 5)
fid, sfid, kid    distances of features of samples and real images, on Inception as papers have them
cmmd              the same on CLIP
is                Inception score
prdc              precision and recall, density and coverage
progressive       estimates of x_0 along the reverse process (figure 6)
shared-latents    samples that share x_t (figure 7)
interpolate       mixtures of two images in latent space (figures 8 and 9)
reconstruct       image -> DDIM latent -> image

Figures and tables are those of Ho et al. 2020; what the other numbers are is in docs/evaluation.md.
"""

import sys
from pathlib import Path

if not __package__:  # run by path, Python looks in trainer/ first, where a module could shadow a library
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from trainer.errors import exit_clearly
from trainer.launcher.parent import end_with_launcher

if __name__ == "__main__" and (status := exit_clearly(end_with_launcher)()):  # before torch, which takes seconds
    sys.exit(status)

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch

from trainer.arguments import add_trained, at_least_one, at_least_two, reverse_request, trained_request
from trainer.drawing.condition_arguments import add_conditions, conditions
from trainer.drawing.trained import Trained, open_trained
from trainer.engine.processes.collectives import each_its_own
from trainer.errors import ConfigError, DataError
from trainer.evaluation.bits_per_dim import BoundRequest, evaluate_bound
from trainer.evaluation.by_features import evaluate_by_features
from trainer.evaluation.feature_arguments import add_features, feature_request
from trainer.evaluation.feature_metrics import (
    FrechetMetric,
    GaussianKernelMetric,
    KernelMetric,
    ManifoldMetric,
    ScoreMetric,
    SpatialFrechetMetric,
)
from trainer.evaluation.figures import (
    FigureImages,
    FigureRequest,
    interpolations,
    progressive_generation,
    reconstructions,
    shared_latents,
)
from trainer.evaluation.images import load_files, open_images
from trainer.sampling.request import ReverseRequest


def parse_arguments() -> argparse.Namespace:
    """The command line; `command` is the function to call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=command.__doc__, description=command.__doc__)
        added.set_defaults(command=command)
        add_trained(added)
        added.add_argument("--seed", type=int, default=0, help="keys all noise (default 0)")
        added.add_argument(
            "--out", type=Path, help="folder, or .png of a figure; default: in RUN/evaluation, named by what it is"
        )
        return added

    bound = add("bpd", bpd)
    bound.add_argument("--data", type=Path, metavar="DIR", help="default: the shards that the run was trained on")
    bound.add_argument("--held-out", action="store_true", help="only images that data.holdout kept out of training")
    bound.add_argument("--images", type=at_least_two, metavar="N", help="so many, drawn at random (default: all)")
    bound.add_argument(
        "--decoder",
        choices=["exact", "tanh"],
        default="exact",
        help="the normal CDF of the last step: exact (default), or as the authors' code approximates it",
    )
    bound.add_argument("--batch", type=at_least_one, default=64, help="images at a time (default 64)")

    add_features(add("fid", fid))
    add_features(add("sfid", sfid))
    add_features(kernel := add("kid", kid))
    kernel.add_argument("--subsets", type=at_least_one, default=100, help="whose mean it is (default 100)")
    kernel.add_argument("--subset-size", type=at_least_two, default=1000, help="images of each (default 1000)")
    kernel.add_argument("--per-class", action="store_true", help="and of each class by itself, of all its images")
    add_features(add("cmmd", cmmd), features="clip")
    add_features(scored := add("is", inception_score), reference=False)
    scored.add_argument("--splits", type=at_least_one, default=10, help="whose mean it is (default 10)")
    add_features(add("prdc", prdc))

    add_conditions(figure6 := add("progressive", progressive))
    figure6.add_argument("--rows", type=at_least_one, default=4, help="samples (default 4)")
    figure6.add_argument("--every", type=at_least_one, help="steps between estimates (default: a 20th of all)")

    add_conditions(figure7 := add("shared-latents", shared))
    figure7.add_argument("--rows", type=at_least_one, default=2, help="latents (default 2)")
    figure7.add_argument("--splits", type=at_least_one, nargs="+", metavar="T", help="default: all steps, 3/4, ...")
    figure7.add_argument("--variants", type=at_least_one, default=3, help="samples of each split (default 3)")

    add_conditions(figure9 := add("interpolate", interpolate))
    _add_images(figure9)
    figure9.add_argument(
        "--timesteps", type=int, nargs="+", metavar="T", help="default: half of all steps; figure 9: 1000 875 .. 0"
    )
    figure9.add_argument("--mixtures", type=at_least_one, default=9, help="evenly between two (default 9: 0.1 to 0.9)")

    add_conditions(reconstruction := add("reconstruct", reconstruct))
    _add_images(reconstruction)
    return parser.parse_args()


def bpd(arguments: argparse.Namespace) -> None:
    """Bits per dimension: the variational bound, each of its terms, rate and distortion."""
    request = BoundRequest(
        trained=trained_request(arguments),
        reverse=reverse_request(arguments),
        data=arguments.data,
        held_out=arguments.held_out,
        images=arguments.images,
        decoder=arguments.decoder,
        seed=arguments.seed,
        batch=arguments.batch,
        out=arguments.out,
    )
    evaluate_bound(request)


def fid(arguments: argparse.Namespace) -> None:
    """Fréchet distance of samples and real images: FID on Inception features."""
    evaluate_by_features(feature_request(arguments), FrechetMetric())


def sfid(arguments: argparse.Namespace) -> None:
    """Spatial Fréchet distance of samples and real images: sFID on Inception features, as ADM has it."""
    evaluate_by_features(feature_request(arguments), SpatialFrechetMetric())


def kid(arguments: argparse.Namespace) -> None:
    """Kernel distance of samples and real images: KID on Inception features."""
    metric = KernelMetric(subsets=arguments.subsets, subset_size=arguments.subset_size)
    evaluate_by_features(feature_request(arguments), metric)


def cmmd(arguments: argparse.Namespace) -> None:
    """Gaussian kernel distance of samples and real images: CMMD on CLIP features."""
    evaluate_by_features(feature_request(arguments), GaussianKernelMetric())


def inception_score(arguments: argparse.Namespace) -> None:
    """Inception score of samples."""
    evaluate_by_features(feature_request(arguments), ScoreMetric(splits=arguments.splits))


def prdc(arguments: argparse.Namespace) -> None:
    """Precision, recall, density and coverage of samples and real images."""
    evaluate_by_features(feature_request(arguments), ManifoldMetric())


def progressive(arguments: argparse.Namespace) -> None:
    """Figure 6: estimates of x_0 along the reverse process."""
    trained = _open(arguments)
    progressive_generation(trained, _figure(arguments, arguments.rows), every=arguments.every)


def shared(arguments: argparse.Namespace) -> None:
    """Figure 7: samples that share x_t for t in --splits."""
    trained = _open(arguments)
    request = _figure(arguments, arguments.rows)
    shared_latents(trained, request, splits=arguments.splits, variants=arguments.variants)


def interpolate(arguments: argparse.Namespace) -> None:
    """Figures 8 and 9: images noised for --timesteps steps, mixed in pairs, denoised."""
    trained = _open(arguments)
    images = _images(arguments, trained)
    interpolations(
        trained,
        _figure(arguments, rows=len(images.pixels)),
        images=images,
        timesteps=arguments.timesteps,
        lambdas=[k / (arguments.mixtures + 1) for k in range(1, arguments.mixtures + 1)],
    )


def reconstruct(arguments: argparse.Namespace) -> None:
    """DDIM, section 5.4: images, their latents, and the images made from these."""
    trained = _open(arguments)
    images = _images(arguments, trained)
    reconstructions(trained, _figure(arguments, rows=len(images.pixels)), images=images)


def _open(arguments: argparse.Namespace) -> Trained:
    return open_trained(trained_request(arguments), _reverse(arguments))


def _figure(arguments: argparse.Namespace, rows: int) -> FigureRequest:
    return FigureRequest(reverse=_reverse(arguments), rows=rows, seed=arguments.seed, out=arguments.out)


def _reverse(arguments: argparse.Namespace) -> ReverseRequest:
    return replace(reverse_request(arguments), conditions=conditions(arguments))


def _add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--files", type=Path, nargs="+", metavar="IMAGE", help="image files; or:")
    parser.add_argument("--data", type=Path, metavar="DIR", help="shards; default: those the run was trained on")
    parser.add_argument("--images", type=at_least_one, default=4, metavar="N", help="of the shards (default 4)")


def _images(arguments: argparse.Namespace, trained: Trained) -> FigureImages:
    if arguments.files is not None:
        pixels = load_files(arguments.files, trained.config.model)
        return FigureImages(pixels=pixels, source={"files": [str(path) for path in arguments.files]})

    def load() -> torch.Tensor:
        images = open_images(trained.config, arguments.data, held_out=False, count=arguments.images)
        return images.load(range(arguments.images))

    where = str(arguments.data or trained.config.data.where)
    pixels = each_its_own("the images: cannot be read", load, kind=DataError)
    return FigureImages(pixels=pixels, source={"data": where, "images": arguments.images})


@exit_clearly
def main() -> int:
    """Parse, wire, run."""
    arguments = parse_arguments()
    if not 0 <= arguments.seed < 2**63:
        raise ConfigError(f"--seed {arguments.seed}: should be at least 0 and below 2^63")
    arguments.command(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
