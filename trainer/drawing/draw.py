"""Draws images from a run's checkpoint over all processes, resumable after a kill."""

from pathlib import Path

from trainer.drawing.outputs import OUTPUTS, Labels, OutputFormat
from trainer.drawing.trained import Trained, TrainedRequest, open_trained
from trainer.drawing.work import Task, Work
from trainer.sampling.request import DEFAULT_SAMPLER, SamplingRequest


def draw(wanted: TrainedRequest, sampling: SamplingRequest, *, out: Path | None, output: OutputFormat) -> Path:
    """Draw the images and return their folder, by default one in RUN/samples; outputs.py says what it holds.

    After a request to stop, all ranks finish their current batch; the results are kept, and the same request resumes.
    Raises TrainerError where the run or the checkpoint cannot be used, or the folder cannot be written.
    """
    trained = open_trained(wanted, sampling)
    out = out or _default_folder(trained, sampling, output)
    # A folder of single files can be extended to more images later; a combined file cannot.
    count = {"count": sampling.count} if output != "folder" else {}
    identity = {**trained.identity, **sampling.identity, **trained.conditioned.identity}
    work = Work(out, {**count, **identity, "format": output}, trained.accelerator)
    written = OUTPUTS[output](work, _labels(trained, sampling.seed))
    if (cost := trained.conditioned.cost()) is not None:
        trained.accelerator.print(cost)
    batches, steps = sampling.batches, trained.denoiser.diffusion.timesteps
    if work.carry_out(
        lambda: written.missing(batches),
        lambda numbers, on_step: written.write(numbers, trained.draw(sampling, numbers, on_step)),
        Task(doing="sampling", items=sampling.count, units=steps),
        trained.stop,
    ):
        written.finish(batches)
        trained.accelerator.print(
            f"{sampling.count} images from {trained.checkpoint} ({trained.weights} weights, "
            f"{sampling.describe(steps)}{trained.conditioned.description}) in {out}"
        )
    trained.accelerator.end_training()
    return out


def _default_folder(trained: Trained, sampling: SamplingRequest, output: OutputFormat) -> Path:
    """RUN/samples/ and a name made of the settings that determine the samples."""
    how = sampling.name_parts
    parts = [*trained.name_parts, *(how[1:] if how[0] == DEFAULT_SAMPLER else how)]
    if output != "folder":
        parts += [output, f"n-{sampling.count}"]
    return trained.folder.samples / "-".join(parts)


def _labels(trained: Trained, seed: int) -> Labels | None:
    def labels(numbers: range) -> list[int]:
        found = trained.conditioned.labels(numbers, seed=seed)
        return [] if found is None else found.tolist()

    return labels if labels(range(1)) else None
