"""How many super-batches may be in flight, and how many bytes of features may wait for scorers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from jest_server.domain.errors import QueueFull, TooLarge
from jest_server.domain.super_batches import Limits

if TYPE_CHECKING:
    from jest_server.domain.jobs import JobSpec
    from jest_server.domain.ports import SuperBatchStore
    from jest_server.runtime.settings import SelectorSettings

SUPER_BATCHES_RETRY_S = 0.25
FEATURES_RETRY_S = 1.0
"""Longer: whoever comes back may have to send all of them again."""
_OF: Final = {"job": "job {job!r}", "tenant": "all jobs of this tenant", "server": "all jobs of this server"}


class Bounds:
    """The limits of one deployment, and the errors of who reaches them."""

    def __init__(self, store: SuperBatchStore, settings: SelectorSettings) -> None:
        self._store = store
        self._settings = settings
        self.features = Limits(
            job=settings.max_feature_bytes_per_job,
            tenant=settings.max_feature_bytes_per_tenant,
            server=settings.max_feature_bytes,
        )

    def super_batches(self, spec: JobSpec) -> Limits:
        """Super-batches that may be in flight."""
        return Limits(
            job=spec.max_in_flight,
            tenant=self._settings.max_super_batches_per_tenant,
            server=self._settings.max_super_batches,
        )

    async def require_room(self, job: str, nbytes: int, context: dict[str, str]) -> None:
        """Refuses features before they are received that would be refused afterwards.

        Raises:
            TooLarge: If they are more than there may ever be.
            QueueFull: If they are more than there may be now.
        """
        whose = self.features.first_exceeded(Limits(), more=nbytes)
        if whose is not None:
            raise TooLarge(
                f"tensors are {nbytes} bytes together, the limit for {_OF[whose].format(job=job)} is "
                f"{getattr(self.features, whose)}: upload fewer positions at a time",
                context,
                field_name="tensors",
            )
        whose = self.features.first_exceeded(await self._store.bytes_held(job), more=nbytes)
        if whose is not None:
            raise self.features_full(whose, job, context)

    def super_batches_full(self, whose: str, spec: JobSpec, context: dict[str, str]) -> QueueFull:
        """The error of one super-batch too many."""
        limit = getattr(self.super_batches(spec), whose)
        named = f"{limit} (max_in_flight)" if whose == "job" else limit
        setting = {"job": "max_in_flight", "tenant": "JEST_MAX_SUPER_BATCHES_PER_TENANT"}
        return QueueFull(
            f"super-batches in flight of {_OF[whose].format(job=spec.name)} reach the limit of {named}",
            context | {"limit": setting.get(whose, "JEST_MAX_SUPER_BATCHES")},
            retry_after_s=SUPER_BATCHES_RETRY_S,
        )

    def features_full(self, whose: str, job: str, context: dict[str, str]) -> QueueFull:
        """The error of features too many."""
        return QueueFull(
            f"features of {_OF[whose].format(job=job)} that wait for scorers reach the limit of "
            f"{getattr(self.features, whose)} bytes",
            context | {"limit": f"JEST_MAX_FEATURE_BYTES{'' if whose == 'server' else f'_PER_{whose.upper()}'}"},
            retry_after_s=FEATURES_RETRY_S,
        )
