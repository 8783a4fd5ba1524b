"""A cascade (Ho et al. 2022, "Cascaded Diffusion Models"): what a run draws, enlarged by networks that upsample.

A run alone is a cascade of one stage. All stages are drawn by the same rank, batch by batch; between two of them images
are quantised to uint8, as in ADM's programs, so that a stage sees what the one before would have written.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from trainer.config import Config
from trainer.config.backbones import ModelConfig, classes_of, upsampler
from trainer.data.images import Pixels
from trainer.drawing.guides import classes_of_classifier
from trainer.drawing.trained import Trained, TrainedRequest, drawable_config, load_trained, open_trained
from trainer.errors import ConfigError
from trainer.sampling.request import SamplingRequest


@dataclass(frozen=True, kw_only=True)
class StageRequest:
    """Weights, and how they are drawn from."""

    trained: TrainedRequest
    sampling: SamplingRequest


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """A trained network that was opened, and how it is drawn from."""

    trained: Trained
    sampling: SamplingRequest

    @property
    def steps(self) -> int:
        """Denoising steps of a sample."""
        return self.trained.denoiser.diffusion.timesteps

    @property
    def identity(self) -> dict[str, Any]:
        """What samples of this stage depend on besides those of the one before."""
        return {**self.trained.identity, **self.sampling.identity, **self.trained.conditioned.identity}

    @property
    def description(self) -> str:
        """For people: "ddpm, 1000 steps, seed 0, classes uniform"."""
        return f"{self.sampling.describe(self.steps)}{self.trained.conditioned.description}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Cascade:
    """A run that draws from noise alone, `base`, and the upsamplers that enlarge what it draws, in their order.

    A sample depends on its number and the seed alone, up to rounding; each stage has noise of its own, and all stages
    that have classes have those of the base.
    """

    base: Stage
    upsamplers: tuple[Stage, ...] = ()

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All, in their order."""
        return (self.base, *self.upsamplers)

    @property
    def last(self) -> Trained:
        """The network whose samples come out."""
        return self.stages[-1].trained

    @property
    def steps(self) -> int:
        """Denoising steps of a sample, over all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def identity(self) -> dict[str, Any]:
        """What samples depend on; partial ones are reused only where all of it is the same."""
        then = [stage.identity for stage in self.upsamplers]
        return {**self.base.identity, **({"then": then} if then else {})}

    @property
    def further_name_parts(self) -> list[str]:
        """For names of files: what follows those of the base."""
        parts: list[str] = []
        for stage in self.upsamplers:
            conditions = replace(stage.sampling.conditions, classes=None)  # the base has named them
            how = replace(stage.sampling, conditions=conditions).how_parts
            parts += ["then", stage.trained.folder.path.resolve().name, *stage.trained.name_parts, *how]
        return parts

    @property
    def description(self) -> str:
        """For people: how the samples are drawn."""
        enlarged = [f"then {stage.trained.checkpoint}: {stage.description}" for stage in self.upsamplers]
        return "; ".join([self.base.description, *enlarged])

    def print_costs(self) -> None:
        """Print the calls of networks that guidance takes, a line for each stage that has it."""
        for stage in self.stages:
            if (cost := stage.trained.conditioned.cost()) is not None:
                self.base.trained.accelerator.print(cost)

    def labels(self, numbers: Sequence[int]) -> list[int] | None:
        """The classes of the samples with these numbers; None where the base has none."""
        found = self.base.trained.conditioned.labels(numbers, seed=self.base.sampling.seed)
        return None if found is None else found.tolist()

    def draw(self, numbers: range, on_step: Callable[[int], object]) -> Pixels:
        """The samples of these numbers, (B, C, H, W) uint8.

        on_step: called after each denoising step with the number of images that advanced.
        """
        drawn: Pixels | None = None
        for stage in self.stages:
            drawn = stage.trained.draw(stage.sampling, numbers, on_step, low_res=drawn)
        assert drawn is not None
        return drawn


def open_cascade(base: StageRequest, then: Sequence[StageRequest] = ()) -> Cascade:
    """Load the weights of all stages on every rank, see `open_trained`; without `then`, of a run alone.

    Raises TrainerError where a run or a checkpoint cannot be used; ConfigError where a request does not suit its run,
    or where a run does not enlarge what the one before draws.
    """
    ready = _ready(base, then)
    first = Stage(trained=open_trained(base.trained, base.sampling), sampling=base.sampling)
    accelerator, stop = first.trained.accelerator, first.trained.stop
    upsamplers = []
    for request, config in ready:
        with _named(request):
            trained = load_trained(request.trained, request.sampling, config, accelerator, stop)
        upsamplers.append(Stage(trained=trained, sampling=request.sampling))
    return Cascade(base=first, upsamplers=tuple(upsamplers))


def _ready(base: StageRequest, then: Sequence[StageRequest]) -> list[tuple[StageRequest, Config]]:
    """The upsamplers' requests, each with its place and the classes of the base, and their configurations."""
    if not then:
        return []
    before = drawable_config(base.trained, base.sampling)
    classes = _classes(before.model, base.sampling)
    ready = []
    for number, request in enumerate(then, start=1):
        with _named(request):
            config = drawable_config(request.trained, request.sampling, upsamples=True)
            _check_that_it_fits(config.model, before.model)
            own_classes = _classes(config.model, request.sampling)
            _check_classes(own_classes, classes)
        conditions = request.sampling.conditions
        if own_classes is not None:  # a sample's class is the same in all stages
            conditions = replace(conditions, classes=base.sampling.conditions.classes)
        sampling = replace(request.sampling, stage=number, conditions=conditions)
        ready.append((replace(request, sampling=sampling), config))
        before = config
    return ready


def _classes(model: ModelConfig, sampling: SamplingRequest) -> int | None:
    """Of how many classes samples are: the network's, or else those of the classifier that guides it."""
    own, classifier = classes_of(model), sampling.conditions.classifier
    return classes_of_classifier(classifier) if own is None and classifier is not None else own


def _check_that_it_fits(model: ModelConfig, before: ModelConfig) -> None:
    """Raise ConfigError where a network does not enlarge images of the one before."""
    section = upsampler(model)
    if section is None:
        raise ConfigError("its network does not upsample, for it has no model.low_res_size", agreed=True)
    for field, own, given in (
        ("low_res_size", section.low_res_size, before.image_size),
        ("channels", model.channels, before.channels),
    ):
        if own != given:
            should = f"should be {given}, as of the images that it is given"
            raise ConfigError(f"model.{field} = {own}: {should}", agreed=True)


def _check_classes(own: int | None, of_base: int | None) -> None:
    """Raise ConfigError where a stage, or the classifier that guides it, has other classes than the base's samples."""
    if own not in (None, of_base):
        should = "the base takes no labels" if of_base is None else f"should be {of_base}, as of the base"
        raise ConfigError(f"model.classes = {own}: {should}", agreed=True)


@contextmanager
def _named(request: StageRequest) -> Iterator[None]:
    """A context whose ConfigError says which stage it is about."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"--then {request.trained.run}: {error}", agreed=error.agreed) from error
