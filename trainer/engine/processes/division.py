"""Work that the ranks divide between them and whose results all of them get."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from accelerate import PartialState

from trainer.engine.processes.collectives import together
from trainer.errors import TrainerError
from trainer.signals import StopAskedError, StopRequest

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_over_ranks(
    items: Sequence[Item],
    function: Callable[[Item], Result],
    *,
    what: str,
    kind: type[TrainerError] = TrainerError,
    stop: StopRequest | None = None,
) -> tuple[list[Result], bool]:
    """`function` of each item, each computed by one rank; the results in the items' order, and whether to stop.

    Collective; the same on all ranks. A request to `stop` on any of them is heeded between two items, and within one
    where `function` calls `stop.check`; items that are not finished then have no result. The results are pickled and
    sent to all ranks. Errors as of `together`.
    """
    state = PartialState()

    def own_share() -> tuple[bool, list[tuple[int, Result]]]:
        done: list[tuple[int, Result]] = []
        with suppress(StopAskedError):
            for number in range(state.process_index, len(items), state.num_processes):
                if stop is not None:
                    stop.check()
                done.append((number, function(items[number])))
        return bool(stop), done

    shares = together(what, own_share, kind=kind)
    results = dict(result for _, of_rank in shares for result in of_rank)
    return [results[number] for number in sorted(results)], any(stopped for stopped, _ in shares)
