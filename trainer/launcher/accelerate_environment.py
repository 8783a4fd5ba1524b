"""What `accelerate launch` was told, by its options or by a file of `accelerate config`: environment variables in,
fields of our configuration out.

What it passes on is in accelerate/utils/launch.py. An option that it does not pass on cannot be seen here, nor whether
"no" for mixed precision and dynamo, which it passes on when it was told nothing, was meant.
"""

from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from trainer.launcher.deepspeed_file import ask_by_deepspeed_file, ask_to_clip, read_deepspeed_file
from trainer.launcher.told import Told, Wish, is_left_open, is_true, positive_whole

_SHARDING = {"FULL_SHARD": "fsdp2", "HYBRID_SHARD": "hsdp", "NO_SHARD": "ddp"}
_SHARDING |= {"1": "fsdp2", "4": "hsdp", "3": "ddp"}  # as older files have them
# Done here in one way, whatever is asked for: with the values that accelerate launch passes on when told nothing.
_FSDP_UNUSED = {
    "auto_wrap_policy": None,
    "transformer_cls_to_wrap": None,
    "backward_prefetch": None,
    "state_dict_type": None,
    "min_num_params": "100000000",
    "forward_prefetch": "false",
    "use_orig_params": "true",
    "cpu_ram_efficient_loading": "true",
    "sync_module_states": "true",
}
_DYNAMO_MODES = {"default": False, "reduce-overhead": True}  # whether CUDA graphs are asked for
# Not ACCELERATE_MIXED_PRECISION, which tells that accelerate started this process.
_READ_BY_ACCELERATE = (
    *("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_", "ACCELERATE_CONFIG_DS_FIELDS", "ACCELERATE_USE_FSDP"),
    *("FSDP_", "ACCELERATE_USE_MEGATRON_LM", "MEGATRON_LM_", "ACCELERATE_USE_PARALLELISM_CONFIG"),
    *("PARALLELISM_CONFIG_", "ACCELERATE_DYNAMO_", "ACCELERATE_FP8_", "ACCELERATE_GRADIENT_"),
)


def read_accelerate(environ: Mapping[str, str]) -> Told:
    """What the environment asks for. Reads the DeepSpeed file that it names; ConfigError where that cannot be read."""
    told = Told()
    _ask_for_precision(told, environ)
    _ask_to_compile(told, environ)
    if is_true(environ.get("ACCELERATE_USE_DEEPSPEED")):
        _ask_for_deepspeed(told, environ)
    if is_true(environ.get("ACCELERATE_USE_FSDP")):
        _ask_for_fsdp(told, environ)
    if is_true(environ.get("ACCELERATE_USE_PARALLELISM_CONFIG")):
        _ask_for_parallelism(told, environ)
    if is_true(environ.get("ACCELERATE_USE_MEGATRON_LM")):
        told.refused.append("use_megatron_lm: Megatron-LM is for language models; take --multi_gpu")
    _refuse_contradictions(told)
    told.cpu = is_true(environ.get("ACCELERATE_USE_CPU"))
    # It names a host to meet at where it was told of several processes, which it leaves to mpirun to start.
    several = "MASTER_ADDR" in environ and "ACCELERATE_USE_CPU" in environ
    told.lone = several and not {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"} & {*environ}
    return told


def asks_for_something(environ: Mapping[str, str]) -> bool:
    """Whether `accelerate launch` was told anything that is about training."""
    switches = ("DEEPSPEED", "FSDP", "PARALLELISM_CONFIG", "MEGATRON_LM")
    choices = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND")
    return any(is_true(environ.get(f"ACCELERATE_USE_{name}")) for name in switches) or any(
        environ.get(name, "no").strip().lower() not in ("no", "") for name in choices
    )


def forget(environ: MutableMapping[str, str]) -> None:
    """Remove what Accelerate and DeepSpeed would read for themselves: the configuration has what was taken of it."""
    for name in [name for name in environ if name.startswith(_READ_BY_ACCELERATE)]:
        del environ[name]


def _refuse_contradictions(told: Told) -> None:
    """What a DeepSpeed file says of a field and what Accelerate does must be the same."""
    first: dict[str, Wish] = {}
    for wish in told.wishes:
        before = first.setdefault(wish.name, wish)
        if before.value != wish.value:
            told.refused.append(f"{before.words} and {wish.words}: differ; leave one out")
    told.wishes = list(first.values())


def _ask_for_precision(told: Told, environ: Mapping[str, str]) -> None:
    precision = environ.get("ACCELERATE_MIXED_PRECISION", "no").strip().lower()
    if precision in ("bf16", "fp16"):
        told.wishes.append(Wish("train.precision", precision, f"mixed_precision = {precision}"))
    elif precision not in ("no", ""):
        told.refused.append(f"mixed_precision = {precision}: should be no, bf16 or fp16")


def _ask_to_compile(told: Told, environ: Mapping[str, str]) -> None:
    backend = environ.get("ACCELERATE_DYNAMO_BACKEND", "no").strip().lower()
    if backend in ("no", ""):
        return
    if backend != "inductor":
        told.refused.append(f"dynamo_backend = {backend}: should be no or inductor")
        return
    told.wishes.append(Wish("train.compile", "regional", "dynamo_backend = inductor"))
    mode = environ.get("ACCELERATE_DYNAMO_MODE", "default")
    if mode not in _DYNAMO_MODES:
        told.refused.append(f"dynamo_mode = {mode}: kernels chosen by timing would round otherwise; take default")
    elif _DYNAMO_MODES[mode]:
        told.wishes.append(Wish("train.cuda_graphs", True, f"dynamo_mode = {mode}"))
    if is_true(environ.get("ACCELERATE_DYNAMO_USE_DYNAMIC")):
        told.unused.append("dynamo_use_dynamic")  # each shape is compiled on its own


def _ask_for_deepspeed(told: Told, environ: Mapping[str, str]) -> None:
    def said(name: str) -> str | None:
        value = environ.get(f"ACCELERATE_DEEPSPEED_{name.upper()}")
        return None if is_left_open(value) else value

    file = said("config_file")
    settings = read_deepspeed_file(Path(file)) if file is not None else {"zero_optimization": {"stage": "auto"}}
    ask_by_deepspeed_file(told, settings, Path(file or ""), said)
    steps = environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    if told.accumulation is None and not is_left_open(steps):
        if (count := positive_whole(steps)) is None:
            told.refused.append(f"gradient_accumulation_steps = {steps}: should be a whole number from 1")
        else:
            told.accumulation = Wish("gradient_accumulation_steps", count, f"gradient_accumulation_steps = {count}")
    norm = environ.get("ACCELERATE_GRADIENT_CLIPPING")
    if not is_left_open(norm) and not any(wish.name == "optimizer.clip_norm" for wish in told.wishes):
        ask_to_clip(told, norm, f"gradient_clipping = {norm}")
    if said("moe_layer_cls_names") is not None:
        told.refused.append("deepspeed_moe_layer_cls_names: the network has no mixture of experts; remove it")
    told.unused += ["zero3_init_flag"] if is_true(said("zero3_init")) else []
    told.unused += ["zero3_save_16bit_model"] if is_true(said("zero3_save_16bit_model")) else []


def _ask_for_fsdp(told: Told, environ: Mapping[str, str]) -> None:
    def said(name: str) -> str | None:
        return environ.get(f"FSDP_{name.upper()}")

    version = said("version") or "1"
    if version == "2":
        strategy: str | None = "fsdp2"
        words = "fsdp_version = 2"
        if not is_true(said("reshard_after_forward") or "true"):
            told.refused_details.append(
                "fsdp_reshard_after_forward = false: weights are freed after the forward pass; take true, or "
                'train.strategy = "zero2", which keeps them'
            )
    else:
        sharding = (said("sharding_strategy") or "FULL_SHARD").upper()
        strategy, words = _SHARDING.get(sharding), f"fsdp_sharding_strategy = {sharding}"
        if strategy is None:
            told.refused_details.append(f'{words}: take FULL_SHARD or HYBRID_SHARD, or train.strategy = "zero2"')
            strategy = "hsdp" if "HYBRID" in sharding else "fsdp2"
    told.strategy = Wish("train.strategy", strategy, words)
    if is_true(said("activation_checkpointing")):
        words = "fsdp_activation_checkpointing = true"
        told.wishes.append(Wish("train.activation_checkpointing", "full", words))
    for name, instead in (
        ("offload_params", 'take train.strategy = "zero3" with train.offload_optimizer = true, or false'),
        ("activation_checkpointing_offload", "activations are recomputed, not offloaded; take false"),
    ):
        if is_true(said(name)):
            told.refused_details.append(f"fsdp_{name} = true: {instead}")
    if not is_left_open(said("ignored_modules")):
        told.refused_details.append("fsdp_ignored_modules: every parameter is sharded; remove it")
    told.unused += [
        f"fsdp_{name}" for name, default in _FSDP_UNUSED.items() if (said(name) or default) not in (None, default)
    ]


def _ask_for_parallelism(told: Told, environ: Mapping[str, str]) -> None:
    """Replicas and shards are "hsdp"; tensors and sequences are not parallel here."""

    def size(name: str) -> Any:
        text = environ.get(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", "1")
        return positive_whole(text) or text

    for name in ("tp", "cp", "sp"):
        if size(name) != 1:
            told.refused.append(f"parallelism_config_{name}_size = {size(name)}: should be 1")
    replicas, shards = size("dp_replicate"), size("dp_shard")
    words = f"parallelism_config_dp_replicate_size = {replicas}, dp_shard_size = {shards}"
    if not isinstance(replicas, int) or not isinstance(shards, int):
        told.refused.append(f"{words}: should be whole numbers from 1")
    elif replicas > 1 and shards > 1:
        told.strategy = Wish("train.strategy", "hsdp", words)
        told.details.append(Wish("train.hsdp_shard_size", shards, words))
    elif replicas > 1:
        told.strategy = Wish("train.strategy", "ddp", words)
