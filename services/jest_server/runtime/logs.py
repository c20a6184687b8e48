"""Structured logs on standard error; ``bound`` puts job, super-batch and rank on every line written inside it."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

import structlog

from jest_wire import tracing

if TYPE_CHECKING:
    from structlog.typing import EventDict, FilteringBoundLogger, Processor

bound = structlog.contextvars.bound_contextvars


def configure(*, process: str, log_format: str, level: str) -> None:
    """Sets the format for the whole process; called once, by the process's ``__main__``."""
    renderer: Processor = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            _with_trace,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(process=process)


def _with_trace(_logger: object, _method: str, event: EventDict) -> EventDict:
    ids = tracing.ids()
    if ids is not None:
        event["trace_id"], event["span_id"] = ids
    return event


def get_logger() -> FilteringBoundLogger:
    """Returns a logger that follows ``configure``, whenever that is called."""
    logger: FilteringBoundLogger = structlog.get_logger()
    return logger
