"""Command-line arguments of the feature metrics."""

import argparse
from pathlib import Path
from typing import get_args

from trainer.arguments import (
    add_cascade,
    add_sampler,
    at_least_one,
    at_least_two,
    sampling_request,
    stage_requests,
    trained_request,
)
from trainer.evaluation.by_features import FeatureRequest, NetworkRequest
from trainer.evaluation.references import ReferenceRequest
from trainer.features.networks import FeatureName


def add_features(
    parser: argparse.ArgumentParser, *, reference: bool = True, features: FeatureName = "inception"
) -> None:
    """Add the arguments for samples, features (by default these) and, if the metric needs one, the reference."""
    add_sampler(parser)
    add_cascade(parser)
    parser.add_argument("--samples", type=at_least_two, default=50_000, help="images to draw (default 50000)")
    parser.add_argument("--batch", type=at_least_one, default=64, help="images drawn at a time (default 64)")
    parser.add_argument(
        "--features",
        choices=get_args(FeatureName),
        default=features,
        help="inception: what papers report; dinov2: as EDM2; clip: as CMMD; efficientnet-lite0: needs no download, "
        f"compares with no paper (default {features})",
    )
    parser.add_argument(
        "--feature-weights", type=Path, metavar="FILE", help="the network's, as published (default: downloaded once)"
    )
    parser.add_argument(
        "--feature-weights-unchecked", action="store_true", help="take weights that are not the published ones"
    )
    if reference:
        parser.add_argument(
            "--reference",
            type=Path,
            metavar="PATH",
            help="folder of shards, or .npz with images (arr_0) or, for fid, mu and sigma, for sfid, mu_s and sigma_s; "
            "default: the images that the run was trained on",
        )
        parser.add_argument("--held-out", action="store_true", help="only images that data.holdout kept from training")
        parser.add_argument(
            "--images",
            type=at_least_one,
            metavar="N",
            help="of the reference, drawn at random (default: all; kid, cmmd, prdc: at most 50000)",
        )


def feature_request(arguments: argparse.Namespace) -> FeatureRequest:
    """The request parsed from the arguments of `add_features` and those common to evaluate.py's commands."""
    sampling = sampling_request(arguments, count=arguments.samples)
    return FeatureRequest(
        trained=trained_request(arguments),
        sampling=sampling,
        then=stage_requests(arguments, sampling),
        network=NetworkRequest(
            name=arguments.features,
            weights=arguments.feature_weights,
            unchecked=arguments.feature_weights_unchecked,
        ),
        reference=ReferenceRequest(
            path=getattr(arguments, "reference", None),
            held_out=getattr(arguments, "held_out", False),
            images=getattr(arguments, "images", None),
        ),
        out=arguments.out,
        per_class=getattr(arguments, "per_class", False),
    )
