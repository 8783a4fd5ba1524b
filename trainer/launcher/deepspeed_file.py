"""A DeepSpeed configuration file (`--deepspeed_config_file`): what it asks for, what is refused of it, what is unused.

https://www.deepspeed.ai/docs/config-json has the fields.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError
from trainer.launcher.told import Told, Wish, is_left_open, number, positive_whole

_TAKEN = {
    *("zero_optimization", "fp16", "bf16", "torch_autocast", "gradient_clipping", "gradient_accumulation_steps"),
    *("train_batch_size", "train_micro_batch_size_per_gpu"),
}
_UNUSED = {
    *("steps_per_print", "wall_clock_breakdown", "dump_state", "memory_breakdown", "flops_profiler", "comms_logger"),
    *("tensorboard", "wandb", "csv_monitor", "comet", "monitor_config", "aio", "checkpoint", "timers"),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "activation_checkpointing", "disable_allgather"),
}
_UNUSED_OF_ZERO = {
    *("allgather_partitions", "allgather_bucket_size", "overlap_comm", "reduce_scatter", "reduce_bucket_size"),
    *("contiguous_gradients", "sub_group_size", "round_robin_gradients", "elastic_checkpoint", "legacy_stage1"),
    *("load_from_fp32_weights", "ignore_unused_parameters", "memory_efficient_linear", "pipeline_loading_checkpoint"),
    *("prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold", "max_live_parameters"),
    *("max_reuse_distance", "gather_16bit_weights_on_model_save", "module_granularity_threshold"),
    *("use_all_reduce_for_fetch_params", "use_multi_rank_bucket_allreduce", "override_module_apply"),
    *("log_trace_cache_warnings", "enable_sanity_checks", "fast_sharding_for_leaf_module", "allgather_sequential"),
}
_SEEN_OF_ZERO = {"stage", "offload_optimizer", "offload_param", "cpu_offload", "cpu_offload_params"}
_UNUSED_OF_PRECISION = {
    *("enabled", "initial_scale_power", "loss_scale_window", "hysteresis", "consecutive_hysteresis"),
    *("min_loss_scale", "auto_cast", "lower_precision_safe_modules", "immediate_grad_update"),
}
_OFF = {
    **{"prescale_gradients": False, "gradient_predivide_factor": 1, "communication_data_type": "fp32"},
    **{"zero_hpz_partition_size": 1, "mics_shard_size": -1, "loss_scale": 0, "ratio": 1, "seq_parallel_size": 1},
}
_INSTEAD = {
    "optimizer": "Adam is what trains here, as [optimizer] says; remove the section",
    "scheduler": "optimizer.learning_rate and optimizer.warmup say the learning rate; remove the section",
    "amp": 'train.precision = "bf16" or "fp16" is what there is',
}
_ELSE = "this trainer has nothing of the kind; remove it"


def read_deepspeed_file(path: Path) -> dict[str, Any]:
    """What the file holds. Raises ConfigError where it cannot be read or is no DeepSpeed configuration."""
    try:
        settings = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"deepspeed_config_file = {path}: cannot be read ({error})") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"deepspeed_config_file = {path}: not valid JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"deepspeed_config_file = {path}: should hold a JSON object")
    return settings


def ask_by_deepspeed_file(told: Told, settings: Mapping[str, Any], path: Path, fallback: Callable[[str], Any]) -> None:
    """Add to `told` what the file asks for.

    `fallback` is asked, by Accelerate's name, for what the file leaves out or to "auto"; None where it says nothing.
    """
    zero = settings.get("zero_optimization", {})
    zero = {"stage": int(zero)} if isinstance(zero, bool) else zero
    for name in ("zero_optimization", "fp16", "bf16", "torch_autocast"):
        if not isinstance(settings.get(name, {}), dict | bool):
            told.refused.append(f"{path.name}: {name} = {settings[name]!r}: should be an object")
            return
    _ask_for_stage(told, zero, path, fallback)
    _ask_for_precision(told, settings, path)
    for name, field in (("train_batch_size", "global_batch"), ("train_micro_batch_size_per_gpu", "micro_batch")):
        if (size := _count(told, settings, name, path)) is not None:
            told.wishes.append(Wish(f"train.{field}", size, f"{name} = {size} in {path.name}"))
    if (steps := _count(told, settings, "gradient_accumulation_steps", path)) is not None:
        words = f"gradient_accumulation_steps = {steps} in {path.name}"
        told.accumulation = Wish("gradient_accumulation_steps", steps, words)
    if not is_left_open(norm := settings.get("gradient_clipping")):
        ask_to_clip(told, norm, f"gradient_clipping = {norm} in {path.name}")
    _sort(settings, f"{path.name}: ", taken=_TAKEN, unused=_UNUSED, told=told, refused=told.refused)


def ask_to_clip(told: Told, norm: Any, words: str) -> None:
    """Add a largest norm of the gradient to `told`; 0 is none."""
    found = number(norm)
    if found is None or not found >= 0:
        told.refused.append(f"{words}: should be a number from 0")
        return
    told.wishes.append(Wish("optimizer.clip_norm", found or float("inf"), words))


def _ask_for_stage(told: Told, zero: Mapping[str, Any], path: Path, fallback: Callable[[str], Any]) -> None:
    stage = zero.get("stage", 0)
    words = f"zero_optimization.stage = {stage} in {path.name}"
    if is_left_open(stage):
        said = fallback("zero_stage")
        stage, words = said or 2, f"zero_stage = {said}" if said else "use_deepspeed (zero_stage = 2)"
    level = positive_whole(stage)  # a configuration may have it as text, "2.0" too
    if level in (1, 2, 3) or number(stage) == 0:
        told.strategy = Wish("train.strategy", f"zero{level}" if level else "ddp", words)
    else:
        told.refused.append(f"{words}: should be 0, 1, 2 or 3")
    for name, older in (("offload_optimizer", "cpu_offload"), ("offload_param", "cpu_offload_params")):
        offload = zero.get(name)
        options = offload if isinstance(offload, dict) else {"device": offload}
        device = "cpu" if zero.get(older) is True else options.get("device")
        words = f"zero_optimization.{name}.device = {device} in {path.name}"
        if is_left_open(device):
            device = fallback(f"{name}_device")
            words = f"{name}_device = {device}"
        if name == "offload_optimizer" and device == "cpu":
            told.details.append(Wish("train.offload_optimizer", True, words))
        elif not is_left_open(device):
            known = "the optimizer, to the host's memory, is all that can be offloaded"
            told.refused_details.append(f"{words}: {known}; take cpu for offload_optimizer, none for offload_param")
        if not _is_off("ratio", options.get("ratio")):
            told.refused_details.append(f"zero_optimization.{name}.ratio in {path.name}: all is offloaded or nothing")
    place = f"{path.name}: zero_optimization."
    _sort(zero, place, taken=_SEEN_OF_ZERO, unused=_UNUSED_OF_ZERO, told=told, refused=told.refused_details)


def _ask_for_precision(told: Told, settings: Mapping[str, Any], path: Path) -> None:
    asked: dict[str, str] = {}
    for name in ("bf16", "fp16"):
        options = settings.get(name, {})
        options = {"enabled": options} if isinstance(options, bool) else options
        if options.get("enabled") is True:
            asked[name] = f"{name}.enabled = true in {path.name}"
            place = f"{path.name}: {name}."
            _sort(options, place, taken={"enabled"}, unused=_UNUSED_OF_PRECISION, told=told, refused=told.refused)
    autocast = settings.get("torch_autocast", {})
    if isinstance(autocast, dict) and autocast.get("enabled") is True:
        dtype = str(autocast.get("dtype", "bfloat16")).removeprefix("torch.")
        precision = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype)
        words = f"torch_autocast.dtype = {dtype} in {path.name}"
        if precision is None:
            told.refused.append(f"{words}: should be bfloat16 or float16")
        else:
            asked[precision] = words
    if len(asked) > 1:
        told.refused.append(f"{' and '.join(asked.values())}: only one of them can be")
        return
    told.wishes += [Wish("train.precision", name, words) for name, words in asked.items()]


def _count(told: Told, settings: Mapping[str, Any], name: str, path: Path) -> int | None:
    value = settings.get(name)
    if is_left_open(value):
        return None
    if (count := positive_whole(value)) is None:
        told.refused.append(f'{name} = {value!r} in {path.name}: should be a whole number from 1, or "auto"')
    return count


def _sort(
    settings: Mapping[str, Any], place: str, *, taken: set[str], unused: set[str], told: Told, refused: list[str]
) -> None:
    """Tell apart the settings that nothing was made of: without effect on what is trained, or refused."""
    for name, value in settings.items():
        known = name.removeprefix("stage3_")
        if name in taken or _is_off(name, value):
            continue
        if known in unused:
            told.unused.append(name)
        else:
            refused.append(f"{place}{name}: {_INSTEAD.get(name, _ELSE)}")


def _is_off(name: str, value: Any) -> bool:
    if isinstance(value, dict):
        return not value or value.get("enabled") is False
    return not value or is_left_open(value) or (name in _OFF and value == _OFF[name])
