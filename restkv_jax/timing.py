"""How long JAX traces, lowers and compiles, so that it can be told apart from running."""

import time

import jax


class CompilationClock:
    """A context in which the wall time that JAX spends on compilation adds up.

    `seconds` counts tracing, lowering and compiling. JAX reports these durations as they end, nested ones included;
    their intervals are united, so none counts twice.
    """

    PREFIX = "/jax/core/compile/"

    def __init__(self):
        self._intervals: list[tuple[float, float]] = []

    def __enter__(self) -> "CompilationClock":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *error) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.startswith(self.PREFIX):
            now = time.perf_counter()
            self._intervals.append((now - duration_secs, now))

    @property
    def seconds(self) -> float:
        """Wall time of compilation so far."""
        return union_length(self._intervals)


def union_length(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of intervals, each given by its ends."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
