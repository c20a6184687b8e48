"""docs/metrics.md: every metric, read from the objects that measure it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from jest_server.runtime import job_metrics, metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

PROCESSES: Final[dict[str, Callable[[CollectorRegistry], object]]] = {
    "selector": metrics.SelectorMetrics,
    "scorer": metrics.ScorerMetrics,
    "control": metrics.ControlMetrics,
}
_MODULES: Final = (metrics.__name__, job_metrics.__name__)
_HEAD: Final = """\
# Metrics

Every process serves its metrics in Prometheus' text format under `/metrics` of `JEST_METRICS_LISTEN`. One prefix
(`jest_`), base units (seconds, bytes), `_total` for what only grows, and no label whose values a client can invent. Job
names are the exception: a selector tells at most `JEST_METRICS_JOBS` live jobs apart (100; 0: none) and adds up all
others as `_other`. A job's series go when it is deleted, or after an hour without a word from it. Of several selectors
each tells the jobs apart that it serves.

This page is made by `jest-server metrics`; a test holds it to what the code has. What the metrics mean for who runs the
server is in [Operations](operations.md). Triton tells its own, prefixed `nv_`.
"""


class Measured(NamedTuple):
    """A metric as a reader of the page, or of a dashboard, knows it."""

    name: str
    kind: str
    labels: tuple[str, ...]
    meaning: str

    def series(self) -> tuple[str, ...]:
        """Returns the names that can be asked for."""
        if self.kind == "histogram":
            return tuple(f"{self.name}_{suffix}" for suffix in ("bucket", "sum", "count"))
        return (self.name,)


def measured(process: str) -> list[Measured]:
    """Returns what a process measures, by name."""
    registry = CollectorRegistry()
    made = PROCESSES[process](registry)
    return sorted(set(_read(_metrics_in(made))))


def page() -> str:
    """Renders the page."""
    sections = [_HEAD]
    seen: set[Measured] = set()
    for process in PROCESSES:
        own = measured(process)
        rows = [_row(each) for each in own if each not in seen]
        again = [f"`{each.name}`" for each in own if each in seen]
        seen |= set(own)
        also = f"\nAs above: {', '.join(again)}.\n" if again else ""
        table = f"| metric | kind | labels | meaning |\n|---|---|---|---|\n{''.join(rows)}"
        sections.append(f"\n## {process.capitalize()}\n\n{table}{also}")
    labels = "".join(f"| `{name}` | {values} |\n" for name, values in sorted(metrics.LABELS.items()))
    sections.append(f"\n## Labels\n\n| label | values |\n|---|---|\n{labels}")
    return "".join(sections)


def _metrics_in(made: object) -> Iterator[MetricWrapperBase]:
    for value in vars(made).values():
        if isinstance(value, MetricWrapperBase):
            yield value
        elif type(value).__module__ in _MODULES:
            yield from _metrics_in(value)


def _read(found: Iterable[MetricWrapperBase]) -> Iterator[Measured]:
    for metric in found:
        (described,) = metric.describe()
        name = f"{described.name}_total" if described.type == "counter" else described.name
        labels = tuple(metric._labelnames)  # noqa: SLF001 - it tells them nowhere else
        yield Measured(name, described.type, labels, described.documentation)


def _row(each: Measured) -> str:
    labels = ", ".join(f"`{label}`" for label in each.labels)
    return f"| `{each.name}` | {each.kind} | {labels} | {each.meaning} |\n"
