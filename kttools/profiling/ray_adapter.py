"""Shards on a Ray cluster (optional extra: kttools[ray]): the same pure function, somewhere else.

A shard's result depends on its arguments alone, so where it runs changes nothing, bit for bit. The workers
need this package and must see the same files under the same names.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from kttools_runtime.errors import EngineError, KTError, UsageError

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_shards(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    address: str | None = None,
    cpus_per_shard: int = 1,
) -> Iterator[tuple[int, Result]]:
    """(index of the task, its result) as they finish. address: a running cluster, or None for this machine.

    function must be importable by the workers (a function of a module, not a closure). Raises UsageError
    without Ray, the function's own KTError, and EngineError for what Ray itself reports.
    """
    ray = _import_ray()
    if cpus_per_shard < 1:
        raise UsageError(f"cpus_per_shard must be positive, got {cpus_per_shard}")
    was_running = ray.is_initialized()
    if not was_running:
        _connect(ray, address)
    try:
        # Threads per worker follow num_cpus: more would fight over the cores Ray counts.
        remote = ray.remote(num_cpus=cpus_per_shard, max_retries=2)(_call)
        pending = {remote.remote(function, task): index for index, task in enumerate(tasks)}
        while pending:
            (done, *_), _ = ray.wait(list(pending), num_returns=1)
            yield pending.pop(done), _result(ray, done)
    finally:
        if not was_running:
            ray.shutdown()


def _call(function: Callable[[Task], Result], task: Task) -> Result:
    """What a worker runs; Ray's decorator takes plain functions only."""
    return function(task)


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise UsageError(f"Ray cannot be imported ({error}); pip install 'kttools[ray]'") from error
    return ray


def _connect(ray: Any, address: str | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone unless asked for
    try:
        ray.init(address=address, log_to_driver=False, include_dashboard=False if address is None else None)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise EngineError(f"Ray at {address or 'this machine'}: {str(error).splitlines()[0]}") from error


def _result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, KTError):
            raise error.cause from None
        raise EngineError(f"a shard failed on a Ray worker: {error.cause!r}") from error
    except ray.exceptions.RayError as error:
        raise EngineError(f"Ray lost a shard: {str(error).splitlines()[0]}") from error
