"""What Accelerate asks for is taken, outvoted with a line, or refused by name; never ignored."""

import math
from pathlib import Path
from typing import Any

import pytest

from tests.accelerate_asks import DEEPSPEED, FSDP, INDUCTOR, NOTHING, PARALLEL, decide
from tests.harness import load_config
from trainer.engine.run_folder import RunFolder
from trainer.errors import ConfigError
from trainer.launcher.accelerate_environment import forget
from trainer.launcher.settle import load_settled, without_effect


@pytest.mark.parametrize(
    ("environ", "taken"),
    [
        ({}, {}),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"precision": "bf16"}),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, {"precision": "fp16"}),
        (DEEPSPEED, {"strategy": "zero2"}),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, {"strategy": "ddp"}),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, {"strategy": "zero3"}),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3.0"}, {"strategy": "zero3"}),
        (
            {**DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            {"strategy": "zero2", "offload_optimizer": True},
        ),
        (
            {**DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none"},
            {"strategy": "zero2"},
        ),
        (
            {
                **DEEPSPEED,
                "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2",
                "ACCELERATE_GRADIENT_CLIPPING": "0.5",
            },
            {"strategy": "zero2", "micro_batch": 2, "clip_norm": 0.5},
        ),
        (
            {
                **DEEPSPEED,
                "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
                "ACCELERATE_GRADIENT_CLIPPING": "0",
            },
            {"strategy": "zero2", "clip_norm": math.inf},
        ),
        (FSDP, {"strategy": "fsdp2"}),
        ({**FSDP, "FSDP_VERSION": "2"}, {"strategy": "fsdp2"}),
        ({**FSDP, "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, {"strategy": "hsdp"}),
        ({**FSDP, "FSDP_SHARDING_STRATEGY": "1"}, {"strategy": "fsdp2"}),
        ({**FSDP, "FSDP_SHARDING_STRATEGY": "NO_SHARD"}, {"strategy": "ddp"}),
        (
            {**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            {"strategy": "fsdp2", "activation_checkpointing": "full"},
        ),
        (PARALLEL, {"strategy": "fsdp2"}),
        ({**PARALLEL, "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"}, {"strategy": "ddp"}),
        (
            {**PARALLEL, "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "4"},
            {"strategy": "hsdp", "hsdp_shard_size": 4},
        ),
        (INDUCTOR, {"compile": "regional"}),
        ({**INDUCTOR, "ACCELERATE_DYNAMO_MODE": "reduce-overhead"}, {"compile": "regional", "cuda_graphs": True}),
    ],
)
def test_accelerates_word_is_taken_where_the_configuration_leaves_a_field_open(
    environ: dict[str, str], taken: dict[str, Any]
) -> None:
    for left_open in ({}, {"strategy": "auto", "precision": "auto"}):
        settled, lines = decide(environ, left_open)
        assert {name: value for name, value in settled.items() if value != "auto"} == taken
        assert len(lines) == len(taken)
        assert all("taken from accelerate (" in line for line in lines)


@pytest.mark.parametrize(
    ("environ", "train", "line"),
    [
        (
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            {"precision": "fp32"},
            'train.precision = "fp32" holds, as the configuration says; accelerate has mixed_precision = bf16',
        ),
        (
            {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"},
            {"strategy": "ddp"},  # and so nothing is offloaded
            'train.strategy = "ddp" holds, as the configuration says; accelerate has zero_stage = 3',
        ),
        (
            {**DEEPSPEED, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            {"strategy": "zero2", "micro_batch": 2},
            "train.micro_batch = 2 holds, as the configuration says; accelerate has gradient_accumulation_steps = 4",
        ),
        (
            INDUCTOR,
            {"compile": "none"},
            'train.compile = "none" holds, as the configuration says; accelerate has dynamo_backend = inductor',
        ),
    ],
)
def test_where_both_speak_the_configuration_holds_and_one_line_says_so(
    environ: dict[str, str], train: dict[str, Any], line: str
) -> None:
    assert decide(environ, train) == (train, [line])


def test_where_both_say_the_same_nothing_is_told() -> None:
    train = {"strategy": "zero2", "precision": "bf16", "micro_batch": 2, "compile": "none"}
    environ = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}
    assert decide({**DEEPSPEED, **environ}, train) == (train, [])


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision = fp8: should be no, bf16 or fp16"),
        ({"ACCELERATE_DYNAMO_BACKEND": "AOT_EAGER"}, "dynamo_backend = aot_eager: should be no or inductor"),
        ({**INDUCTOR, "ACCELERATE_DYNAMO_MODE": "max-autotune"}, "dynamo_mode = max-autotune: kernels chosen by"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "use_megatron_lm: Megatron-LM is for language models"),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "4"}, "zero_stage = 4: should be 0, 1, 2 or 3"),
        (
            {**DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"},
            "offload_param_device = cpu: the optimizer, to the host's memory, is all that can be offloaded",
        ),
        (
            {**DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"},
            "offload_optimizer_device = nvme: the optimizer, to the host's memory,",
        ),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": "X"}, "deepspeed_moe_layer_cls_names: "),
        (
            {**DEEPSPEED, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"},
            "gradient_accumulation_steps = 3: train.global_batch = 8 is not divisible by 2 processes x 3 accumulated",
        ),
        ({**DEEPSPEED, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "0"}, "gradient_accumulation_steps = 0: should be"),
        ({**DEEPSPEED, "ACCELERATE_GRADIENT_CLIPPING": "nan"}, "gradient_clipping = nan: should be a number from 0"),
        ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params = true: take train.strategy"),
        ({**FSDP, "FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}, "fsdp_sharding_strategy = SHARD_GRAD_OP: take FULL_"),
        (
            {**FSDP, "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"},
            "fsdp_reshard_after_forward = false: weights are freed",
        ),
        ({**FSDP, "FSDP_IGNORED_MODULES": "x"}, "fsdp_ignored_modules: every parameter is sharded"),
        ({**PARALLEL, "PARALLELISM_CONFIG_TP_SIZE": "2"}, "parallelism_config_tp_size = 2: should be 1"),
        (
            {**PARALLEL, "PARALLELISM_CONFIG_DP_SHARD_SIZE": "-1"},
            "parallelism_config_dp_replicate_size = 1, dp_shard_size = -1: should",
        ),
    ],
)
def test_what_cannot_be_taken_is_refused_by_name_in_one_line(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        decide(environ)
    assert str(caught.value).startswith(f"accelerate: {message}")
    assert "\n" not in str(caught.value)


def test_what_is_done_in_another_way_with_the_same_result_is_named() -> None:
    environ = {**FSDP, "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT", "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}
    (_, line) = decide(environ)[1]
    assert line == "accelerate: without effect here: fsdp_auto_wrap_policy, fsdp_state_dict_type (docs/accelerate.md)"
    (_, line) = decide({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"})[1]
    assert "zero3_init_flag" in line


def test_one_process_where_several_may_have_been_asked_for_is_told() -> None:
    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert decide(alone) == ({}, ["accelerate: started one process; several take --multi_gpu, on CPUs, too"])
    assert decide({**alone, "WORLD_SIZE": "2"}) == ({}, [])


def test_what_is_decided_is_written_as_decided_and_kept_by_a_run_that_goes_on(config_path: Path) -> None:
    """A run keeps its own strategy and precision where nobody says otherwise, whatever made them."""
    new, lines = load_settled(
        config_path, [], {**NOTHING, **DEEPSPEED, "ACCELERATE_MIXED_PRECISION": "bf16"}, gpus=False
    )
    assert (new.train.strategy, new.train.precision, len(lines)) == ("zero2", "bf16", 2)
    folder = RunFolder(Path(new.run_dir), writes=True)
    folder.path.mkdir()
    folder.begin(new)
    assert 'strategy = "zero2"' in folder.config.read_text()
    for left_open in ([], ["train.strategy=auto", "train.precision=auto"]):
        assert load_settled(config_path, left_open, NOTHING, gpus=False) == (new, [])
    again, _ = load_settled(config_path, ["train.precision=fp32"], NOTHING, gpus=False)
    assert (again.train.strategy, again.train.precision) == ("zero2", "fp32")
    again, _ = load_settled(config_path, [], {**NOTHING, **FSDP}, gpus=False)
    assert (again.train.strategy, again.train.precision) == ("fsdp2", "bf16")
    folder.config.write_bytes(b"\xff\xfe[train")
    again, (line,) = load_settled(config_path, [], NOTHING, gpus=False)
    assert (again.train.strategy, again.train.precision) == ("ddp", "fp32")
    assert line.startswith(f"{folder.config}: cannot be read (")


def test_auto_stands_for_what_is_left_out(config_path: Path) -> None:
    assert load_config(config_path, "train.strategy=auto", "train.precision=auto") == load_config(config_path)
    with pytest.raises(ConfigError, match=r"train\.compile = 'auto': should be 'none' or 'regional'"):
        load_config(config_path, "train.compile=auto")


def test_gpus_that_accelerate_was_told_to_leave_alone(config_path: Path) -> None:
    environ = {**NOTHING, "ACCELERATE_USE_CPU": "True"}
    assert load_settled(config_path, [], environ, gpus=False)[1] == []
    with pytest.raises(ConfigError, match=r"accelerate: cpu: .* set CUDA_VISIBLE_DEVICES="):
        load_settled(config_path, [], environ, gpus=True)


def test_libraries_find_nothing_of_it_in_the_environment() -> None:
    environ = {**NOTHING, **DEEPSPEED, **PARALLEL, **INDUCTOR, "HOME": "/"}
    environ |= {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
    forget(environ)
    assert environ == {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "False", "HOME": "/"}


def test_programs_that_go_by_a_runs_configuration_say_that_they_do() -> None:
    assert without_effect(NOTHING) is None
    for environ in ({"ACCELERATE_MIXED_PRECISION": "bf16"}, DEEPSPEED, FSDP, INDUCTOR):
        line = without_effect({**NOTHING, **environ})
        assert line is not None
        assert line.startswith("accelerate: ")
