"""Draws images from a run's checkpoint over all processes, resumable after a kill."""

from dataclasses import dataclass
from pathlib import Path

from trainer.evaluation.outputs import Labels, OutputFormat, make_output
from trainer.evaluation.trained import Trained, TrainedRequest, open_trained
from trainer.evaluation.work import Task, Work
from trainer.sampling.request import DEFAULT_SAMPLER, SamplingRequest


@dataclass(frozen=True, kw_only=True)
class DrawRequest:
    """The weights, the samples, and the output."""

    trained: TrainedRequest
    sampling: SamplingRequest
    out: Path | None
    output: OutputFormat


def draw(request: DrawRequest) -> Path:
    """Draw the images and return their folder; see trainer/evaluation/outputs.py for its content.

    After a request to stop, all ranks finish their current batch; the results are kept, and the same request resumes.
    Raises TrainerError where the run or the checkpoint cannot be used, or the folder cannot be written.
    """
    sampling = request.sampling
    trained = open_trained(request.trained, sampling)
    out = request.out or default_folder(trained, request)
    work = Work(out, _identity(trained, request), trained.accelerator)
    output = make_output(request.output, work, _labels(trained, sampling.seed))
    batches, steps = sampling.batches, trained.denoiser.diffusion.timesteps
    if (cost := trained.conditioned.cost()) is not None:
        trained.accelerator.print(cost)
    if work.carry_out(
        lambda: output.missing(batches),
        lambda numbers, on_step: output.write(numbers, trained.draw(sampling, numbers, on_step)),
        Task(doing="sampling", items=sampling.count, units=steps),
        trained.stop,
    ):
        output.finish(batches)
        trained.accelerator.print(
            f"{sampling.count} images from {trained.checkpoint} ({trained.weights} weights, "
            f"{sampling.describe(steps)}{trained.conditioned.description}) in {out}"
        )
    trained.accelerator.end_training()
    return out


def default_folder(trained: Trained, request: DrawRequest) -> Path:
    """RUN/samples/ and a name made of the settings that determine the samples."""
    how = request.sampling.name_parts
    parts = [*trained.name_parts, *(how[1:] if how[0] == DEFAULT_SAMPLER else how)]
    if request.output != "folder":
        parts += [request.output, f"n-{request.sampling.count}"]
    return trained.folder.samples / "-".join(parts)


def _labels(trained: Trained, seed: int) -> Labels | None:
    def labels(numbers: range) -> list[int]:
        found = trained.conditioned.labels(numbers, seed=seed)
        return [] if found is None else found.tolist()

    return labels if labels(range(1)) else None


def _identity(trained: Trained, request: DrawRequest) -> dict[str, object]:
    # A folder of single files can be extended to more images later; a combined file cannot.
    count = {"count": request.sampling.count} if request.output != "folder" else {}
    conditions = trained.conditioned.identity
    return {**count, **trained.identity, **request.sampling.identity, **conditions, "format": request.output}
