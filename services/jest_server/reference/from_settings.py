"""Choose the reference model's adapter that a process's settings name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jest_server.reference.triton import TritonReferenceModel, TritonSettings

if TYPE_CHECKING:
    from jest_server.domain.inference import Outcome
    from jest_server.domain.ports import ReferenceModel
    from jest_server.runtime import metrics
    from jest_server.runtime.settings import ScorerSettings


def reference_model(settings: ScorerSettings, counts: metrics.ScorerMetrics) -> ReferenceModel:
    """Makes the adapter that the settings name; to be called inside the event loop that uses it."""

    def observe(examples: int, seconds: float, outcome: Outcome) -> None:
        counts.inference_duration.labels(outcome.value).observe(seconds)
        counts.inference_examples.labels(outcome.value).inc(examples)

    if settings.reference_backend == "triton":
        triton = TritonSettings(
            url=settings.triton_url,
            model=settings.reference_model,
            microbatch=settings.microbatch,
            concurrency=settings.concurrent_inferences,
            timeout_s=settings.inference_timeout_s,
        )
        return TritonReferenceModel(triton, on_inference=observe)
    from jest_server.reference.in_process import InProcessReferenceModel  # noqa: PLC0415 - needs torch

    if settings.model_repository is None:
        raise ValueError("JEST_MODEL_REPOSITORY is not set, expected a folder: reference_backend is in_process")
    return InProcessReferenceModel(
        settings.model_repository,
        model=settings.reference_model,
        microbatch=settings.microbatch,
        on_inference=observe,
    )
