"""Reports of feature metrics, with all that the values depend on: the printed line and the JSON file."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.drawing.cascade import Cascade, Stage
from trainer.evaluation.references import ReferenceImages, ReferenceStatistics
from trainer.features.networks import Convention
from trainer.telemetry.environment import installed_version
from trainer.telemetry.files import write_whole


@dataclass(frozen=True, kw_only=True)
class Report:
    """`title`: the metric; `numbers`: its values, the main one first; `settings`: the metric's; `drawn_by`: how the
    samples were drawn, for people; `about`: samples, features and, if there is one, reference; `by_class`: the kernel
    distance of each class, where it was asked for.
    """

    title: str
    numbers: dict[str, float]
    settings: dict[str, Any]
    drawn_by: str
    about: dict[str, dict[str, Any]]
    by_class: dict[int, float] | None = None

    def write(self, path: Path) -> None:
        """Write the JSON file atomically."""
        versions = {name: installed_version(name) for name in ("ddpm-trainer", "torch", "torch-fidelity")}
        by_class = {} if self.by_class is None else {"kernel_distance_by_class": self.by_class}
        numbers = {**self.numbers, **by_class}
        content = {"metric": self.title, **numbers, **self.settings, **self.about, "versions": versions}
        write_whole(path, json.dumps(content, indent=1) + "\n")

    def line(self) -> str:
        """The report as a line of text."""
        samples, features = self.about["samples"], self.about["features"]
        settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.settings.items())
        line = (
            f"{self.title}: {self._values()}{settings and f' ({settings})'}; {samples['number']} samples of step "
            f"{samples['step']} ({samples['weights']} weights, {self.drawn_by}, {samples['precision']}, "
            f"{samples['pixels']})"
        )
        if "reference" in self.about:
            reference = self.about["reference"]
            of = f"{reference['number']} images" if "number" in reference else "mean and covariance"
            line += f" against {of} of {reference['name']}"
        weights = features["weights_sha256"][:8]
        return f"{line}; {features['network']} (sha256 {weights}), resized {features['resize']}"

    def _values(self) -> str:
        if len(self.numbers) <= 2:  # a value, and its deviation if there is one
            values = " +- ".join(f"{value:.6g}" for value in self.numbers.values())
        else:
            values = ", ".join(f"{name} {value:.4f}" for name, value in self.numbers.items())
        if not self.by_class:
            return values
        least, most = (choose(self.by_class, key=self.by_class.__getitem__) for choose in (min, max))
        return (
            f"{values}; kernel distance of {len(self.by_class)} classes by themselves from {self.by_class[least]:.6g} "
            f"(class {least}) to {self.by_class[most]:.6g} (class {most})"
        )


def samples_about(cascade: Cascade) -> dict[str, dict[str, Any]]:
    """The report's entry on the samples; of a cascade with one on each upsampler."""
    then = [_stage_about(stage) for stage in cascade.upsamplers]
    about = {"number": cascade.base.sampling.count, **_stage_about(cascade.base), **({"then": then} if then else {})}
    return {"samples": about}


def _stage_about(stage: Stage) -> dict[str, Any]:
    trained, sampling = stage.trained, stage.sampling
    return {
        "checkpoint": str(trained.checkpoint),
        "step": trained.step,
        "weights": trained.weights,
        "sampler": sampling.how,
        "steps": stage.steps,
        "respacing": sampling.respacing,
        "variance": trained.variance,
        "seed": sampling.seed,
        "precision": trained.config.train.precision,
        "pixels": "uint8",
        **trained.conditioned.identity,
    }


def reference_about(reference: ReferenceImages | ReferenceStatistics | None) -> dict[str, dict[str, Any]]:
    """The report's entry on the reference."""
    if reference is None:
        return {}
    number = {"number": reference.count} if isinstance(reference, ReferenceImages) else {}
    return {"reference": {"name": reference.name, **number, "fingerprint": reference.fingerprint}}


def features_about(convention: Convention) -> dict[str, dict[str, Any]]:
    """The report's entry on the features, which are computed in float32."""
    return {"features": {**asdict(convention), "precision": "fp32"}}
