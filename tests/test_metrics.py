"""Logs of a restarted run: no step twice, none backward, in JSON lines and in TensorBoard."""

import re
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from tests.harness import REPOSITORY, launch, overrides, write_config
from trainer.telemetry.metrics import Metrics, read_metrics

ON_GPUS = {"device/memory_allocated_bytes", "device/memory_reserved_bytes"}


def test_work_that_was_lost_and_done_again_is_logged_once(tmp_path: Path) -> None:
    first = Metrics(tmp_path, 0)
    for step in range(1, 6):
        first.scalars(step, {"loss": 1.0})
    first.close()
    again = Metrics(tmp_path, 3)
    for step in range(4, 8):
        again.scalars(step, {"loss": 2.0})
    again.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(s, 1.0 + (s > 3)) for s in range(1, 8)]
    assert tensorboard_steps(tmp_path, "loss") == [1, 2, 3, 4, 5, 6, 7]


def test_a_line_cut_by_a_kill_is_left_out(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0)
    metrics.scalars(1, {"loss": 1.0})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 2, "lo')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]
    Metrics(tmp_path, 1).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'


def test_a_run_logs_what_the_readme_says(tmp_path: Path, dataset: Path) -> None:
    config = str(write_config(tmp_path, dataset))
    launch(1, "--config", config, *overrides(log__every="2 steps", train__duration="5 steps"))
    logs = tmp_path / "run" / "logs"
    records = read_metrics(logs)
    assert [record["step"] for record in records] == [2, 4, 5]
    told = documented_scalars("train/", "time/", "device/", "goodput/") - ON_GPUS - {"train/noise_scale"}
    quartiles = {f"train/loss_q{number}" for number in (1, 2, 3, 4)}
    for record in records:
        assert told - quartiles <= record.keys() <= told | {"step"}
    assert quartiles <= {name for record in records for name in record}
    # steps 1 to 5 had lr x min(step / warmup, 1) with step = 0..4 and warmup = 2: the first one moves nothing
    assert [record["train/learning_rate"] for record in records] == [5e-4, 1e-3, 1e-3]
    assert tensorboard_steps(logs, "train/loss") == [2, 4, 5]


def test_tensorboard_has_configuration_hyperparameters_validation_and_grids(tmp_path: Path, dataset: Path) -> None:
    """The text of a restart comes beside the first; scalars stay those of one run."""
    config = str(write_config(tmp_path, dataset))
    shown = {"data__holdout": 0.3, "log__validate_every": "2 steps", "log__samples_every": "2 steps"}
    for duration, rate in (("2 steps", 1e-3), ("4 steps", 2e-3)):
        again = {"train__duration": duration, "optimizer__learning_rate": rate}
        launch(1, "--config", config, *overrides(**shown, **again))
    logs = tmp_path / "run" / "logs"
    accumulator = EventAccumulator(str(logs), size_guidance={"images": 0, "tensors": 0})
    accumulator.Reload()
    texts = accumulator.Tensors("configuration/text_summary")
    assert [text.step for text in texts] == [0, 2]
    assert "learning_rate = 0.002" in texts[-1].tensor_proto.string_val[0].decode()
    assert [image.step for image in accumulator.Images("samples")] == [2, 4]
    assert [value.step for value in accumulator.Scalars("validation/ema_loss")] == [2, 4]
    assert tensorboard_steps(logs, "train/loss") == [1, 2, 3, 4]
    told = accumulator.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    started = HParamsPluginData.FromString(told).session_start_info
    assert started.hparams["optimizer.learning_rate"].number_value == 1e-3  # TensorBoard keeps the first
    assert started.hparams["model.channel_multipliers"].string_value == "[1, 2]"
    told = accumulator.SummaryMetadata("_hparams_/experiment").plugin_data.content
    judged = [info.name.tag for info in HParamsPluginData.FromString(told).experiment.metric_infos]
    assert judged == ["train/loss", "validation/loss", "validation/ema_loss"]


def documented_scalars(*groups: str) -> set[str]:
    """The names in the tables of docs/telemetry.md."""
    names: set[str] = set()
    for line in (REPOSITORY / "docs" / "telemetry.md").read_text().splitlines():
        if line.startswith("| `"):
            names |= set(re.findall(r"`([a-z]+/[a-z0-9_]+)`", line.split("|")[1]))
    return {name for name in names if name.startswith(groups)}


def tensorboard_steps(folder: Path, name: str) -> list[int]:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [event.step for event in accumulator.Scalars(name)]
