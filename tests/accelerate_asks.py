"""What `accelerate launch` passes on, and what is made of it."""

from typing import Any

from trainer.launcher.accelerate_environment import read_accelerate
from trainer.launcher.settle import settle

NOTHING = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_CPU": "False"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
FSDP = {  # what accelerate launch --use_fsdp passes on by default
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "1",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_MIN_NUM_PARAMS": "100000000",
    "FSDP_FORWARD_PREFETCH": "false",
    "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_SYNC_MODULE_STATES": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
}
INDUCTOR = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_MODE": "default"}
PARALLEL = {
    **FSDP,
    "FSDP_VERSION": "2",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    **{f"PARALLELISM_CONFIG_{name}_SIZE": "1" for name in ("DP_REPLICATE", "DP_SHARD", "TP", "CP", "SP")},
}


def decide(
    environ: dict[str, str], train: dict[str, Any] | None = None, *, own: dict[str, str] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Fields of [train], and clip_norm, as settled for two processes and a batch of 8; and the lines."""
    raw = {"train": {"global_batch": 8, **(train or {})}, "optimizer": {}}
    settled, lines = settle(raw, read_accelerate({**NOTHING, **environ}), own or {}, world_size=2)
    return {
        name: v for name, v in {**settled["train"], **settled["optimizer"]}.items() if name != "global_batch"
    }, lines
