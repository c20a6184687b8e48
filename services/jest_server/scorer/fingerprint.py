"""Compare a reference model's fingerprint with the first one of its version, which all scorers share.

A version names weights that never change. If they are replaced under the same version, old and new embeddings would mix
in the cache and in single super-batches; so the model is refused until the weights, or the version, are put right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jest_server.domain.errors import ReferenceModelError
from jest_server.domain.fingerprints import fingerprint_of, least_cosine
from jest_server.runtime.logs import get_logger

if TYPE_CHECKING:
    from jest_server.domain.ports import JobStore, ReferenceModel
    from jest_server.domain.references import ReferenceInfo
    from jest_server.runtime.metrics import ScorerMetrics

_log = get_logger()


class FingerprintMismatch(ReferenceModelError):
    """The model answers otherwise than the first one of its name and version did."""


class FingerprintCheck:
    """Take fingerprints of a model and compare them; `min_cosine` is the least that counts as the same."""

    def __init__(self, jobs: JobStore, model: ReferenceModel, metrics: ScorerMetrics, *, min_cosine: float) -> None:
        self._jobs = jobs
        self._model = model
        self._metrics = metrics
        self._min_cosine = min_cosine
        self._refused = False

    async def verify(self, reference: ReferenceInfo) -> None:
        """Compare the model's fingerprint with the recorded one, which it becomes if there is none.

        Raises:
            FingerprintMismatch: If a row differs by more than the tolerance.
            ReferenceModelError: If the fingerprint cannot be taken.
            StoreUnavailable: If the queue does not answer.
        """
        found = fingerprint_of(await self._model.fingerprint(reference))
        first = await self._jobs.record_fingerprint(reference, found)
        cosine = least_cosine(found, first, width=reference.embedding_width)
        if cosine >= self._min_cosine:
            self._refused = False
            return
        self._metrics.fingerprint_mismatches.inc()
        message = (
            f"model {reference.name} answers otherwise than version {reference.version} did first: "
            f"cosine {cosine:.6f}, expected at least {self._min_cosine:g}; other weights need a version of their own"
        )
        if not self._refused:
            _log.error("reference model is refused", error=message)
        self._refused = True
        raise FingerprintMismatch(message, retryable=True)
