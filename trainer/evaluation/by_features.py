"""Feature metrics of a run's samples: FID, sFID, KID, CMMD, Inception score, precision, recall, density, coverage.

OUT/samples-.../            features of the samples, shared by all metrics
OUT/reference-.../          features of the real images, shared by all checkpoints
OUT/fid-....json            the metric and all conventions that it depends on; likewise the others
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.drawing.cascade import Cascade, StageRequest, open_cascade
from trainer.drawing.trained import Trained, TrainedRequest
from trainer.drawing.work import Task, Work
from trainer.engine.processes.collectives import each_its_own, together
from trainer.errors import ConfigError, DataError
from trainer.evaluation.feature_metrics import FeatureMetric, Reference
from trainer.evaluation.feature_report import Report, features_about, reference_about, samples_about
from trainer.evaluation.feature_sets import FeatureSet
from trainer.evaluation.per_class import classes_of_images, classes_of_samples, distances_by_class
from trainer.evaluation.references import ReferenceImages, ReferenceRequest, ReferenceStatistics, open_reference
from trainer.features.clip import Clip
from trainer.features.dinov2 import DinoV2
from trainer.features.inception import Inception
from trainer.features.networks import EfficientNetLite0, FeatureName, FeatureNetwork
from trainer.sampling.request import SamplingRequest, batches_of
from trainer.world import local_rank

_REFERENCE_BATCH = 256  # real images per file of features
_DOWNLOADED: dict[FeatureName, type[Inception | DinoV2 | Clip]] = {
    "inception": Inception,
    "dinov2": DinoV2,
    "clip": Clip,
}


@dataclass(frozen=True, kw_only=True)
class NetworkRequest:
    """The feature network; the file of its weights (None: downloaded, or installed), and whether to accept `unchecked`
    ones.
    """

    name: FeatureName
    weights: Path | None
    unchecked: bool


@dataclass(frozen=True, kw_only=True)
class FeatureRequest:
    """What to sample, from which weights, the reference and the features; then: upsamplers that enlarge the samples;
    out: None for RUN/evaluation; per_class: whether to measure each class by itself, too.
    """

    trained: TrainedRequest
    sampling: SamplingRequest
    network: NetworkRequest
    reference: ReferenceRequest
    then: Sequence[StageRequest] = ()
    out: Path | None
    per_class: bool = False


def evaluate_by_features(request: FeatureRequest, metric: FeatureMetric) -> Path | None:
    """Sample, compute the metric, print it and write it; returns the JSON file, or None after a request to stop.

    After a kill or a stop, the same request resumes. Raises TrainerError where the run, the weights of either network
    or the reference cannot be used.
    """
    cascade = open_cascade(StageRequest(trained=request.trained, sampling=request.sampling), request.then)
    path = _judge(cascade, request, metric)
    cascade.base.trained.accelerator.end_training()
    return path


def _judge(cascade: Cascade, request: FeatureRequest, metric: FeatureMetric) -> Path | None:
    trained = cascade.base.trained
    drawn = classes_of_samples(cascade) if request.per_class else None
    network = _open_network(request.network, trained.device)
    if metric.needs.kind not in network.kinds:
        raise ConfigError(
            f"--features {request.network.name}: gives {', '.join(network.kinds)}, {metric.name} needs "
            f"{metric.needs.kind}; take inception",
            agreed=True,
        )
    opened = _open_reference(request, cascade.last, metric)
    metric.check(request.sampling.count, opened.count if isinstance(opened, ReferenceImages) else None)
    out = request.out or trained.folder.path / "evaluation"
    reference = _reference_features(trained, opened, network, metric, out)
    if opened is not None and reference is None:
        return None
    samples = _sample_features(cascade, request, network, metric, out)
    if samples is None:
        return None
    by_class = None
    if drawn is not None and isinstance(opened, ReferenceImages) and isinstance(reference, FeatureSet):
        by_class = distances_by_class(samples, reference, drawn=drawn, real=classes_of_images(opened))
    report = Report(
        title=metric.title(network.convention),
        numbers=metric.measure(samples, reference),
        settings=metric.about(),
        drawn_by=cascade.description,
        about={
            **samples_about(cascade),
            **reference_about(opened),
            **features_about(network.convention),
        },
        by_class=by_class,
    )
    path = out / f"{_report_name(request, metric, samples, opened)}.json"
    together(f"{path}: cannot be written", lambda: report.write(path), only_rank=0)
    trained.accelerator.print(f"{report.line()}; in {path}")
    return path


def _report_name(
    request: FeatureRequest,
    metric: FeatureMetric,
    samples: FeatureSet,
    opened: ReferenceImages | ReferenceStatistics | None,
) -> str:
    """Of the JSON file: what the number depends on."""
    parts = [metric.name, samples.work.folder.name.removeprefix("samples-"), f"n-{request.sampling.count}"]
    if opened is not None:
        parts.append(f"against-{_slug(opened.name)}-{opened.fingerprint[:8]}")
    if isinstance(opened, ReferenceImages):
        parts.append(f"n-{opened.count}")
    parts += [f"{_slug(setting)}-{value}" for setting, value in vars(metric).items()]
    return "-".join([*parts, "per-class"] if request.per_class else parts)


def _open_network(request: NetworkRequest, device: torch.device) -> FeatureNetwork:
    what, downloaded = f"--features {request.name}", _DOWNLOADED.get(request.name)

    def open_it() -> FeatureNetwork:
        if downloaded is not None:
            weights = request.weights or downloaded.published().path
            return downloaded(weights, device, unchecked=request.unchecked)
        if request.weights is not None:
            raise ConfigError(f"--feature-weights: goes with --features {', '.join(_DOWNLOADED)}")
        return EfficientNetLite0(device)

    if downloaded is not None and request.weights is None:
        is_first_of_node = local_rank() == 0
        together(what, lambda: downloaded.published().download() if is_first_of_node else None, kind=ConfigError)
    return each_its_own(what, open_it, kind=ConfigError)


def _open_reference(
    request: FeatureRequest, trained: Trained, metric: FeatureMetric
) -> ReferenceImages | ReferenceStatistics | None:
    if not metric.needs.reference:
        return None
    statistics = metric.needs.statistics if request.network.name == "inception" else None
    return each_its_own(
        f"{request.reference.path or trained.config.data.where}: cannot be read",
        lambda: open_reference(
            request.reference,
            trained.config,
            most=metric.needs.most,
            statistics=statistics,
            labelled=request.per_class,
        ),
        kind=DataError,
    )


def _reference_features(
    trained: Trained,
    opened: ReferenceImages | ReferenceStatistics | None,
    network: FeatureNetwork,
    metric: FeatureMetric,
    out: Path,
) -> Reference:
    """Features of the real images, or the file's statistics; None without a reference, or after a request to stop."""
    if not isinstance(opened, ReferenceImages):
        return opened
    name = f"reference-{_slug(opened.name)}-{opened.fingerprint[:8]}-n-{opened.count}-{network.convention.features}"
    identity = {
        "data": opened.fingerprint,
        "which": opened.name,
        "images": opened.count,
        **_features_of(network),
    }
    work = Work(out / name, identity, trained.accelerator)
    features = FeatureSet(name="reference images", work=work, batches=batches_of(opened.count, _REFERENCE_BATCH))
    if metric.needs.statistics is not None and features.has_moments(metric.needs.kind):
        return features

    def images(numbers: range, advance: Callable[[int], object]) -> torch.Tensor:
        advance(len(numbers))
        return opened.pixels(numbers)

    task = Task(doing="features of real images", items=opened.count, what=features.name, unit="img", kind=DataError)
    return features if features.fill(images, network, task, trained.stop, metric.needs.kind) else None


def _sample_features(
    cascade: Cascade,
    request: FeatureRequest,
    network: FeatureNetwork,
    metric: FeatureMetric,
    out: Path,
) -> FeatureSet | None:
    """Features of the samples; None after a request to stop."""
    trained, sampling = cascade.base.trained, request.sampling
    parts = [*trained.name_parts, *sampling.name_parts, *cascade.further_name_parts, request.network.name]
    work = Work(out / "-".join(["samples", *parts]), {**cascade.identity, **_features_of(network)}, trained.accelerator)
    features = FeatureSet(name="samples", work=work, batches=sampling.batches)
    if metric.needs.statistics is not None and features.has_moments(metric.needs.kind):
        return features

    cascade.print_costs()

    def images(numbers: range, on_step: Callable[[int], object]) -> torch.Tensor:
        return torch.from_numpy(cascade.draw(numbers, on_step))

    task = Task(doing="sampling", items=sampling.count, what=features.name, units=cascade.steps, kind=DataError)
    return features if features.fill(images, network, task, trained.stop, metric.needs.kind) else None


def _features_of(network: FeatureNetwork) -> dict[str, str]:
    convention = network.convention
    return {"features": convention.features, "weights of the features' network": convention.weights_sha256}


def _slug(name: str) -> str:
    """The last component of a folder's or file's name, made usable within another name."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", Path(name).name.removesuffix(".npz")).strip("-")
