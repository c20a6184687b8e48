"""How many super-batches may be in flight, and how many bytes of features may wait for scorers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from jest_server.domain.errors import QueueFull, TooLarge
from jest_server.domain.super_batches import Limits, SubmitStatus, UploadStatus

if TYPE_CHECKING:
    from jest_server.domain.jobs import JobSpec
    from jest_server.domain.ports import SuperBatchStore
    from jest_server.runtime.settings import SelectorSettings

SUPER_BATCHES_RETRY_S = 0.25
FEATURES_RETRY_S = 1.0
"""Longer, because a retry may have to send all of them again."""
_SUBMIT_FULL: Final = {SubmitStatus.JOB_FULL, SubmitStatus.TENANT_FULL, SubmitStatus.SERVER_FULL}
_UPLOAD_FULL: Final = {UploadStatus.JOB_FULL, UploadStatus.TENANT_FULL, UploadStatus.SERVER_FULL}
_OF: Final = {"job": "job {job!r}", "tenant": "all jobs of this tenant", "server": "all jobs of this server"}


class Quotas:
    """The limits of one deployment, and the errors for exceeding them."""

    def __init__(self, store: SuperBatchStore, settings: SelectorSettings) -> None:
        self._store = store
        self._settings = settings
        self.features = Limits(
            job=settings.max_feature_bytes_per_job,
            tenant=settings.max_feature_bytes_per_tenant,
            server=settings.max_feature_bytes,
        )

    def super_batches(self, spec: JobSpec) -> Limits:
        """Return how many super-batches may be in flight."""
        return Limits(
            job=spec.max_in_flight,
            tenant=self._settings.max_super_batches_per_tenant,
            server=self._settings.max_super_batches,
        )

    async def require_room(self, job: str, nbytes: int, metadata: dict[str, str]) -> None:
        """Refuse features before they are received if they would be refused afterwards.

        Raises:
            TooLarge: If they exceed a limit by themselves.
            QueueFull: If they exceed a limit together with the features that wait now.
        """
        whose = self.features.first_exceeded(Limits(), more=nbytes)
        if whose is not None:
            raise TooLarge(
                f"tensors are {nbytes} bytes together, the limit for {_OF[whose].format(job=job)} is "
                f"{getattr(self.features, whose)}: upload fewer positions at a time",
                metadata,
                field_name="tensors",
            )
        whose = self.features.first_exceeded(await self._store.bytes_held(job), more=nbytes)
        if whose is not None:
            raise self._features_full(whose, job, metadata)

    def require_in_flight(self, status: SubmitStatus, spec: JobSpec, metadata: dict[str, str]) -> None:
        """Raise QueueFull if the store refused a super-batch because a limit was reached."""
        if status not in _SUBMIT_FULL:
            return
        whose = status.value
        limit = getattr(self.super_batches(spec), whose)
        named = f"{limit} (max_in_flight)" if whose == "job" else limit
        setting = {"job": "max_in_flight", "tenant": "JEST_MAX_SUPER_BATCHES_PER_TENANT"}
        raise QueueFull(
            f"super-batches in flight of {_OF[whose].format(job=spec.name)} reach the limit of {named}",
            metadata | {"limit": setting.get(whose, "JEST_MAX_SUPER_BATCHES")},
            retry_after_s=SUPER_BATCHES_RETRY_S,
        )

    def require_accepted(self, status: UploadStatus, job: str, metadata: dict[str, str]) -> None:
        """Raise QueueFull if the store refused an upload because a limit was reached."""
        if status in _UPLOAD_FULL:
            raise self._features_full(status.value, job, metadata)

    def _features_full(self, whose: str, job: str, metadata: dict[str, str]) -> QueueFull:
        return QueueFull(
            f"features of {_OF[whose].format(job=job)} that wait for scorers reach the limit of "
            f"{getattr(self.features, whose)} bytes",
            metadata | {"limit": f"JEST_MAX_FEATURE_BYTES{'' if whose == 'server' else f'_PER_{whose.upper()}'}"},
            retry_after_s=FEATURES_RETRY_S,
        )
