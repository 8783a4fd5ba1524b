"""Draws images from a run's checkpoint over all processes, resumable after a kill."""

from dataclasses import dataclass
from pathlib import Path

from data_prep.progress import WorkProgress
from trainer.engine.processes.collectives import together
from trainer.engine.sampling import batches_of, sample
from trainer.errors import ConfigError
from trainer.evaluation.outputs import OutputFormat, make_output
from trainer.evaluation.samplers import SamplerChoice, make_sampler
from trainer.evaluation.trained import Trained, TrainedRequest, open_trained
from trainer.evaluation.work import Work


@dataclass(frozen=True, kw_only=True)
class DrawRequest:
    """The weights, the sampler, the number of images, and the output."""

    trained: TrainedRequest
    sampler: SamplerChoice
    count: int
    seed: int
    out: Path | None
    output: OutputFormat
    batch: int


def draw(request: DrawRequest) -> Path:
    """Draw the images and return their folder; see trainer/evaluation/outputs.py for its content.

    After a request to stop, all ranks finish their current batch; the results are kept, and the same request resumes.
    Raises TrainerError where the run or the checkpoint cannot be used, or the folder cannot be written.
    """
    if not 0 <= request.seed < 2**63:
        raise ConfigError(f"--seed {request.seed}: should be at least 0 and below 2^63")
    sampler = make_sampler(request.sampler)
    trained = open_trained(request.trained)
    out = request.out or default_folder(trained, request)
    work = Work(out, _identity(trained, request), trained.accelerator)
    output = make_output(request.output, work)
    batches = batches_of(request.count, request.batch)
    share = output.missing(batches)
    with WorkProgress(
        total=trained.reverse.diffusion.timesteps * sum(map(len, share)),
        what="sampling",
        unit="step",
        visible=trained.accelerator.is_main_process,
    ) as bar:
        drawn = sample(
            trained.reverse,
            sampler,
            shape=trained.image_shape,
            device=trained.device,
            batches=share,
            seed=request.seed,
            on_step=bar.update,
        )

        def write_all() -> bool:
            for numbers, images in drawn:
                output.write(numbers, images)
                if work.is_stopping(trained.stop):
                    return True
            return False

        stopped = any(together(f"{out}: cannot be written", write_all))
    if stopped and work.tell_of_stop(trained.stop, output.missing(batches), request.count, "images"):
        trained.accelerator.end_training()
        return out
    output.finish(batches)
    if trained.accelerator.is_main_process:
        print(
            f"{request.count} images from {trained.checkpoint} ({trained.weights} weights, {request.sampler}, "
            f"{trained.reverse.diffusion.timesteps} steps, seed {request.seed}) in {out}"
        )
    trained.accelerator.end_training()
    return out


def default_folder(trained: Trained, request: DrawRequest) -> Path:
    """RUN/samples/ and a name made of the settings that determine the samples."""
    parts = [f"step-{trained.step:08d}", trained.weights]
    if (how := str(request.sampler)) != "ddpm":
        parts.append(how)
    if request.trained.respacing != "all":
        parts.append(request.trained.respacing.replace(",", "-"))
    if request.trained.variance is not None:
        parts.append(request.trained.variance)
    parts.append(f"seed-{request.seed}")
    if request.output != "folder":
        parts += [request.output, f"n-{request.count}"]
    return trained.folder.samples / "-".join(parts)


def _identity(trained: Trained, request: DrawRequest) -> dict[str, object]:
    # A folder of single files can be extended to more images later; a combined file cannot.
    count = {"count": request.count} if request.output != "folder" else {}
    return {
        **count,
        **samples_identity(
            trained, request.sampler, respacing=request.trained.respacing, batch=request.batch, seed=request.seed
        ),
        "format": request.output,
    }


def samples_identity(trained: Trained, sampler: object, *, respacing: str, batch: int, seed: int) -> dict[str, object]:
    """The settings that determine the samples; partial results are reused only where all are equal."""
    return {
        "checkpoint": trained.fingerprint,
        "weights": trained.weights,
        "sampler": str(sampler),
        "respacing": respacing,
        "variance": trained.config.diffusion.variance,
        "batch": batch,
        "seed": seed,
    }
