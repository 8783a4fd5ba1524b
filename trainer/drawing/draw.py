"""Draws images from a run's checkpoint over all processes, resumable after a kill."""

from collections.abc import Sequence
from pathlib import Path

from trainer.drawing.cascade import Cascade, StageRequest, open_cascade
from trainer.drawing.outputs import OUTPUTS, Labels, OutputFormat
from trainer.drawing.trained import TrainedRequest
from trainer.drawing.work import Task, Work
from trainer.sampling.request import SamplingRequest


def draw(
    wanted: TrainedRequest,
    sampling: SamplingRequest,
    *,
    then: Sequence[StageRequest] = (),
    out: Path | None,
    output: OutputFormat,
) -> Path:
    """Draw the images and return their folder, by default one in RUN/samples; outputs.py says what it holds.

    then: upsamplers that enlarge them, see `Cascade`. After a request to stop, all ranks finish their current batch;
    the results are kept, and the same request resumes. Raises TrainerError where a run or a checkpoint cannot be used,
    or the folder cannot be written.
    """
    cascade = open_cascade(StageRequest(trained=wanted, sampling=sampling), then)
    trained = cascade.base.trained
    out = out or _default_folder(cascade, output)
    # A folder of single files can be extended to more images later; a combined file cannot.
    count = {"count": sampling.count} if output != "folder" else {}
    work = Work(out, {**count, **cascade.identity, "format": output}, trained.accelerator)
    written = OUTPUTS[output](work, _labels(cascade))
    cascade.print_costs()
    batches = sampling.batches
    if work.carry_out(
        lambda: written.missing(batches),
        lambda numbers, on_step: written.write(numbers, cascade.draw(numbers, on_step)),
        Task(doing="sampling", items=sampling.count, units=cascade.steps),
        trained.stop,
    ):
        written.finish(batches)
        trained.accelerator.print(
            f"{sampling.count} images from {trained.checkpoint} ({trained.weights} weights, {cascade.description}) "
            f"in {out}"
        )
    trained.accelerator.end_training()
    return out


def _default_folder(cascade: Cascade, output: OutputFormat) -> Path:
    """RUN/samples/ and a name made of the settings that determine the samples."""
    trained, sampling = cascade.base.trained, cascade.base.sampling
    parts = [*trained.name_parts, *sampling.how_parts, f"seed-{sampling.seed}", *cascade.further_name_parts]
    if output != "folder":
        parts += [output, f"n-{sampling.count}"]
    return trained.folder.samples / "-".join(parts)


def _labels(cascade: Cascade) -> Labels | None:
    return (lambda numbers: cascade.labels(numbers) or []) if cascade.labels(range(1)) else None
