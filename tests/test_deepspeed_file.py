"""What a DeepSpeed file asks for is taken, outvoted with a line, or refused by name; never ignored."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.accelerate_asks import DEEPSPEED, decide
from trainer.errors import ConfigError
from trainer.launcher.deepspeed_file import read_deepspeed_file


def deepspeed(tmp_path: Path, settings: Any) -> dict[str, str]:
    """The environment of `accelerate launch --use_deepspeed --deepspeed_config_file`."""
    path = tmp_path / "ds.json"
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return {**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}


USUAL = {  # as transformers' documentation has it
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "none"},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "stage3_max_live_parameters": 1e9,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
    "steps_per_print": 2000,
}


def test_a_usual_deepspeed_file_is_taken(tmp_path: Path) -> None:
    settled, lines = decide(deepspeed(tmp_path, USUAL))
    assert settled == {"strategy": "zero3", "offload_optimizer": True}
    assert lines[:2] == [
        'train.strategy = "zero3": taken from accelerate (zero_optimization.stage = 3 in ds.json)',
        "train.offload_optimizer = true: taken from accelerate "
        "(zero_optimization.offload_optimizer.device = cpu in ds.json)",
    ]
    unused = "overlap_comm, contiguous_gradients, sub_group_size, stage3_max_live_parameters, steps_per_print"
    assert lines[2:] == [f"accelerate: without effect here: {unused} (docs/accelerate.md)"]


@pytest.mark.parametrize(
    ("settings", "taken"),
    [
        ({}, {"strategy": "ddp"}),
        ({"zero_optimization": True}, {"strategy": "zero1"}),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, {"strategy": "zero2", "offload_optimizer": True}),
        ({"zero_optimization": {"stage": "auto"}}, {"strategy": "zero1"}),
        ({"bf16": {"enabled": True}}, {"strategy": "ddp", "precision": "bf16"}),
        ({"fp16": {"enabled": True, "initial_scale_power": 16}}, {"strategy": "ddp", "precision": "fp16"}),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, {"strategy": "ddp", "precision": "bf16"}),
        ({"gradient_clipping": 2, "gradient_accumulation_steps": 2}, {"clip_norm": 2, "micro_batch": 2}),
        ({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 1}, {"micro_batch": 1}),
        ({"gradient_accumulation_steps": "auto"}, {"micro_batch": 1}),
    ],
)
def test_a_deepspeed_file_and_what_it_leaves_to_accelerate(
    settings: dict[str, Any], taken: dict[str, Any], tmp_path: Path
) -> None:
    environ = deepspeed(tmp_path, settings) | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}
    if settings.get("gradient_accumulation_steps") == "auto":
        environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = "4"
    settled, _ = decide(environ)
    assert settled == {"strategy": "ddp", **taken}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "should hold a JSON object"),
        ({"optimizer": {"type": "AdamW"}}, "ds.json: optimizer: Adam is what trains here, as [optimizer] says"),
        ({"scheduler": {"type": "WarmupLR"}}, "ds.json: scheduler: optimizer.learning_rate and optimizer.warmup say"),
        ({"zero_optimisation": {"stage": 2}}, "ds.json: zero_optimisation: this trainer has nothing of the kind"),
        ({"zero_optimization": {"stage": 7}}, "zero_optimization.stage = 7 in ds.json: should be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": "two"}}, "zero_optimization.stage = two in ds.json: should be 0, 1, 2 or 3"),
        ({"zero_optimization": [2]}, "ds.json: zero_optimization = [2]: should be an object"),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
            "ds.json: zero_optimization.zero_quantized_weights: this trainer has nothing",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "zero_optimization.offload_param.device = nvme in ds.json: the optimizer",
        ),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16.enabled = true in ds.json and fp16.enabled"),
        ({"fp16": {"enabled": True, "loss_scale": 128}}, "ds.json: fp16.loss_scale: this trainer has nothing"),
        ({"train_batch_size": 8.5}, "train_batch_size = 8.5 in ds.json: should be a whole number from 1"),
        ({"gradient_clipping": "much"}, "gradient_clipping = much in ds.json: should be a number from 0"),
        ({"communication_data_type": "fp16"}, "ds.json: communication_data_type: this trainer has nothing"),
    ],
)
def test_what_a_deepspeed_file_asks_for_in_vain_is_refused_by_name(settings: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        decide(deepspeed(tmp_path, settings))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_deepspeed_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^deepspeed_config_file = .*none\.json: cannot be read"):
        read_deepspeed_file(tmp_path / "none.json")


def test_a_deepspeed_file_and_a_configuration_that_differ_in_the_batch(tmp_path: Path) -> None:
    _, lines = decide(deepspeed(tmp_path, {"train_batch_size": 256}), {"strategy": "ddp"})
    assert lines == [
        "train.global_batch = 8 holds, as the configuration says; accelerate has train_batch_size = 256 in ds.json"
    ]


def test_accelerate_and_a_deepspeed_file_that_differ_in_precision_are_refused(tmp_path: Path) -> None:
    environ = deepspeed(tmp_path, {"bf16": {"enabled": True}}) | {"ACCELERATE_MIXED_PRECISION": "fp16"}
    with pytest.raises(ConfigError, match=r"mixed_precision = fp16 and bf16\.enabled = true in ds\.json: differ"):
        decide(environ)
