"""The reference model inside this process: the stand-in where Triton cannot run. It needs torch and safetensors.

Reads the same model repository as Triton and gives the same embeddings; one inference runs at a time.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from jest_server.domain.errors import ReferenceModelError
from jest_server.domain.inference import InferenceObserver, Outcome, ignore
from jest_server.reference.arrays import check_norms, count_examples, neutral_example
from jest_server.reference.probe import embed_probe
from jest_server.reference.repository import LoadedReference
from jest_server.runtime.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from jest_server.domain.references import ReferenceInfo

    Arrays = Mapping[str, npt.NDArray[Any]]

T = TypeVar("T")

_log = get_logger()


class InProcessReferenceModel:
    """A ``ReferenceModel`` that runs the repository's towers with torch, in a thread of its own."""

    def __init__(
        self,
        repository: Path,
        *,
        model: str = "jest_reference",
        microbatch: int = 64,
        device: str = "cpu",
        on_inference: InferenceObserver = ignore,
    ) -> None:
        self._repository = repository
        self._model = model
        self._microbatch = microbatch
        self._device = device
        self._on_inference = on_inference
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reference")
        self._loaded: LoadedReference | None = None

    async def info(self) -> ReferenceInfo:
        """Loads the model if this is the first call, and tells about it.

        Raises:
            ReferenceModelError: If the repository cannot be used, naming the file.
        """
        return (await self._in_thread(self._load)).info

    async def embed(self, inputs: Arrays) -> npt.NDArray[np.float32]:
        """Embeds n examples: ``[n, 2, D]`` float32, image before text.

        Raises:
            ReferenceModelError: Not retryable for inputs that are not the model's; retryable if a tower fails.
        """
        return await self._in_thread(lambda: self._embed(inputs))

    async def fingerprint(self, reference: ReferenceInfo) -> npt.NDArray[np.float32]:
        """Embed the probe examples.

        Raises:
            ReferenceModelError: If they cannot be embedded, or another version is served by now.
        """
        return await embed_probe(self, reference)

    async def ready(self) -> bool:
        """Tells whether the model is loaded, or can be, and embeds a neutral example."""
        try:
            probe = neutral_example(await self.info())
            await self._in_thread(lambda: self._embed(probe, norms=False))
        except ReferenceModelError as error:
            _log.info("reference model is not ready", model=self._model, error=str(error))
            return False
        return True

    async def close(self) -> None:
        """Waits for the inference in hand and ends the thread."""
        await asyncio.to_thread(self._thread.shutdown)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _load(self) -> LoadedReference:
        if self._loaded is None:
            self._loaded = LoadedReference(self._repository, self._model, device=self._device)
        return self._loaded

    def _embed(self, inputs: Arrays, *, norms: bool = True) -> npt.NDArray[np.float32]:
        loaded = self._load()
        examples = count_examples(loaded.info, inputs)
        step = min(self._microbatch, loaded.max_batch_size)
        parts = [
            self._infer(loaded, {name: array[start : start + step] for name, array in inputs.items()}, norms=norms)
            for start in range(0, examples, step)
        ]
        return np.concatenate([np.empty((0, 2, loaded.info.embedding_width), np.float32), *parts])

    def _infer(self, loaded: LoadedReference, part: Arrays, *, norms: bool) -> npt.NDArray[np.float32]:
        started = time.monotonic()
        outcome = Outcome.FAILED
        try:
            embeddings = loaded.embed(part)
            if norms:
                check_norms(loaded.info, embeddings)
            outcome = Outcome.OK
        except ReferenceModelError:
            outcome = Outcome.BROKEN_OUTPUT
            raise
        except (IndexError, ValueError) as error:  # what torch raises for values that a tower cannot take
            outcome = Outcome.REFUSED
            raise self._failure(error, retryable=False) from error
        except Exception as error:
            raise self._failure(error, retryable=True) from error
        finally:
            self._on_inference(len(next(iter(part.values()))), time.monotonic() - started, outcome)
        return embeddings

    def _failure(self, error: Exception, *, retryable: bool) -> ReferenceModelError:
        return ReferenceModelError(
            f"model {self._model}: {type(error).__name__}: {error}", retryable=retryable, divisible=True
        )
