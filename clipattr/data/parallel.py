"""Work on many files in processes that end with their parent."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from threading import Thread
from time import monotonic
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
# Seconds of work in this process before others are started: importing torch takes them as long.
PATIENCE = 4.0


def map_in_processes(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    workers: int,
    patience: float | None = None,
) -> Iterator[Result]:
    """function(item) of each item, in their order.

    Args:
        function: of a module, as it is sent to the processes.
        items: what it is called with.
        workers: processes; below 2, or when it takes no more than seconds, this one does all.
        patience: PATIENCE, or another number of seconds.
    """
    limit = PATIENCE if patience is None else patience
    begin = monotonic()
    done = 0
    while done < len(items) and (workers < 2 or monotonic() - begin < limit):
        yield function(items[done])
        done += 1
    if done == len(items):
        return
    # spawn: fork would copy the locks of threads that the caller has used.
    context = get_context("spawn")
    n_processes = min(workers, len(items) - done)
    with ProcessPoolExecutor(n_processes, context, end_with_parent) as pool:
        yield from pool.map(function, items[done:])


def end_with_parent() -> None:
    """Let a worker die with its parent; killed hard, the parent cannot tell it to."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()
