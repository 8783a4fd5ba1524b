"""What holds: the configuration; where it leaves a field open, the launcher's word; else what the run had before."""

import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from trainer.config import Config, TrainConfig
from trainer.config.reading import apply_override, read_toml
from trainer.errors import ConfigError
from trainer.launcher.accelerate_environment import asks_for_something, read_accelerate
from trainer.launcher.told import Told, Wish

# Of [train]: left open, a run goes on with its own.
_KEPT = {name: get_args(TrainConfig.model_fields[name].annotation) for name in ("strategy", "precision")}
_WHERE = "docs/accelerate.md"


def load_settled(
    path: Path, overrides: Sequence[str], environ: Mapping[str, str], *, gpus: bool
) -> tuple[Config, list[str]]:
    """A run's configuration with nothing left open, and a line for each decision that the user should know of.

    `gpus`: whether there are any. Errors as `Config.load`; ConfigError, too, for what the launcher was told that cannot
    be taken.
    """
    raw = read_toml(path)
    for override in overrides:
        apply_override(raw, override)
    told = read_accelerate(environ)
    if told.cpu and gpus:
        raise ConfigError("accelerate: cpu: GPUs are taken where there are any; to hide them set CUDA_VISIBLE_DEVICES=")
    own, lines = _own_fields(raw)
    settled, decisions = settle(raw, told, own, world_size=int(environ.get("WORLD_SIZE", "1")))
    return Config.parse(settled, source=str(path)), lines + decisions


def settle(
    raw: Mapping[str, Any], told: Told, own: Mapping[str, Any], *, world_size: int
) -> tuple[dict[str, Any], list[str]]:
    """`raw`, what a configuration file holds, with the open fields filled that somebody speaks for, and the decisions.

    Open is what the file leaves out or to "auto". `own`: fields of [train] as the run had them when it was last
    started. Raises ConfigError for what cannot be taken.
    """
    settled = {name: dict(value) if isinstance(value, dict) else value for name, value in raw.items()}
    lines: list[str] = []
    refused, wishes = list(told.refused), list(told.wishes)
    if told.strategy is not None and _take(settled, told.strategy, lines):
        refused += told.refused_details
        wishes += told.details
    if refused:
        raise ConfigError("; ".join(f"accelerate: {reason}" for reason in refused) + f" ({_WHERE})")
    for wish in wishes:
        _take(settled, wish, lines)
    if told.accumulation is not None:
        _accumulate(settled, told.accumulation, world_size, lines)
    train = settled.get("train")
    if isinstance(train, dict):
        settled["train"] = train | {name: own[name] for name in _KEPT if name in own and _is_open(train.get(name))}
    if told.unused:
        lines.append(f"accelerate: without effect here: {', '.join(dict.fromkeys(told.unused))} ({_WHERE})")
    if told.lone:
        lines.append("accelerate: started one process; several take --multi_gpu, on CPUs, too")
    return settled, lines


def without_effect(environ: Mapping[str, str]) -> str | None:
    """A line for programs that go by the configuration of a run that was trained, where the launcher asks for more."""
    if not asks_for_something(environ):
        return None
    return "accelerate: what it was told of precision, strategy and compilation is not used here: the run's own is"


def _take(settled: dict[str, Any], wish: Wish, lines: list[str]) -> bool:
    """Fill the field if it is open; returns whether its value is the one that is wished for."""
    section, _, name = wish.name.partition(".")
    table = settled.setdefault(section, {})
    if not isinstance(table, dict):
        return False  # validation will say so
    if _is_open(table.get(name)):
        table[name] = wish.value
        lines.append(f"{wish.name} = {_toml(wish.value)}: taken from accelerate ({wish.words})")
        return True
    if table[name] == wish.value:
        return True
    lines.append(_holds(wish.name, table[name], wish))
    return False


def _holds(name: str, value: Any, wish: Wish) -> str:
    return f"{name} = {_toml(value)} holds, as the configuration says; accelerate has {wish.words}"


def _accumulate(settled: dict[str, Any], wish: Wish, world_size: int, lines: list[str]) -> None:
    train = settled.setdefault("train", {})
    batch = train.get("global_batch") if isinstance(train, dict) else None
    if type(batch) is not int or batch < 1:
        return  # validation will say so
    share, rest = divmod(batch, world_size)
    micro_batch = train.get("micro_batch")
    if micro_batch is not None:
        if type(micro_batch) is int and micro_batch > 0 and share != micro_batch * wish.value:
            lines.append(_holds("train.micro_batch", micro_batch, wish))
    elif rest or share % wish.value:
        raise ConfigError(
            f"accelerate: {wish.words}: train.global_batch = {batch} is not divisible by "
            f"{world_size} processes x {wish.value} accumulated"
        )
    elif wish.value > 1:
        train["micro_batch"] = share // wish.value
        lines.append(f"train.micro_batch = {share // wish.value}: taken from accelerate ({wish.words})")


def _own_fields(raw: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """What the run's own copy of its configuration says of the fields that it keeps; none for a run that is new."""
    run_dir, train = raw.get("run_dir"), raw.get("train", {})
    if not isinstance(run_dir, str) or not isinstance(train, dict) or not any(_is_open(train.get(n)) for n in _KEPT):
        return {}, []
    path = Path(run_dir) / "config.toml"
    try:
        own = tomllib.loads(path.read_text()).get("train")
    except (FileNotFoundError, NotADirectoryError):
        return {}, []
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        return {}, [f"{path}: cannot be read ({reason}); train.strategy and precision are not taken from there"]
    return {name: own[name] for name, valid in _KEPT.items() if isinstance(own, dict) and own.get(name) in valid}, []


def _is_open(value: Any) -> bool:
    return value is None or value == "auto"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and math.isinf(value):
        return "inf"
    return f'"{value}"' if isinstance(value, str) else str(value)
