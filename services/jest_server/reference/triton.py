"""The reference model behind NVIDIA Triton, over gRPC.

Examples are cut to the model's batch limit and embedded by at most ``concurrency`` requests at a time. Requests that
fail because Triton is busy or away for a moment are repeated; what fails after that is a ``ReferenceModelError``.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt
import tritonclient.grpc.aio as triton
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential,
    wait_random,
)
from tritonclient.utils import InferenceServerException

from jest_server.domain.errors import ReferenceModelError
from jest_server.domain.inference import InferenceObserver, Outcome, ignore
from jest_server.reference.arrays import check_norms, checked_embedding, count_examples, neutral_example
from jest_server.reference.config import OUTPUTS, reference_info
from jest_server.reference.probe import embed_probe
from jest_server.reference.triton_answers import decode_output
from jest_server.runtime.logs import get_logger
from jest_wire import tracing

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Mapping

    from tritonclient.grpc import model_config_pb2

    from jest_server.domain.references import ReferenceInfo

    Arrays = Mapping[str, npt.NDArray[Any]]

T = TypeVar("T")

_UNLIMITED = 2**31 - 1
_MAX_ANSWER_BYTES: Final = 256 << 20
"""The largest answer that is read: 8,000 examples of width 4,096 fit, or 500 of the greatest width."""
_MAX_DETAIL: Final = 500
"""How many characters of Triton's words are kept: they are logged and become part of dead letters."""
_CHANNEL_ARGS: Final = [
    ("grpc.max_send_message_length", _UNLIMITED),
    ("grpc.max_receive_message_length", _MAX_ANSWER_BYTES),
    # Back within half a second of Triton's return; gRPC's own default waits up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
]
_QUEUE_FULL = "Exceeds maximum queue size"
_OUTCOMES: Final = {
    "StatusCode.UNAVAILABLE": Outcome.UNAVAILABLE,
    "StatusCode.DEADLINE_EXCEEDED": Outcome.TIMEOUT,
    "StatusCode.INVALID_ARGUMENT": Outcome.REFUSED,
}
_DIVISIBLE: Final = {Outcome.REFUSED, Outcome.FAILED, Outcome.BROKEN_OUTPUT}
"""Failures that single examples may have caused."""
_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 2.0
_JITTER_S = 0.5
_log = get_logger()


@dataclass(frozen=True)
class TritonSettings:
    """Where Triton is and how it may be used."""

    url: str
    """Host and port of its gRPC endpoint."""
    model: str = "jest_reference"
    microbatch: int = 64
    """Examples in one request; the model's own max_batch_size limits it further."""
    concurrency: int = 4
    """Requests at a time."""
    timeout_s: float = 30.0
    """Deadline of one request."""
    retries: int = 6
    """Repetitions of a request while Triton is busy or away: six take about 6 seconds."""
    ready_timeout_s: float = 5.0
    """Deadline of a readiness probe."""


@dataclass(frozen=True)
class _Served:
    """What Triton's configuration said at one moment."""

    info: ReferenceInfo
    max_batch_size: int


class _CallFailed(ReferenceModelError):
    """A failed request; ``outcome`` tells whether to repeat it at once."""

    def __init__(self, message: str, outcome: Outcome) -> None:
        super().__init__(message, retryable=outcome is not Outcome.REFUSED, divisible=outcome in _DIVISIBLE)
        self.outcome = outcome


class TritonReferenceModel:
    """A ``ReferenceModel`` served by Triton; to be made inside the event loop that uses it."""

    def __init__(self, settings: TritonSettings, *, on_inference: InferenceObserver = ignore) -> None:
        self._settings = settings
        self._on_inference = on_inference
        self._client = triton.InferenceServerClient(settings.url, channel_args=_CHANNEL_ARGS)
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._served: _Served | None = None
        self._worked = False

    async def info(self) -> ReferenceInfo:
        """Reads the model's configuration from Triton; ``embed`` holds on to what this returned last.

        Raises:
            ReferenceModelError: If Triton does not serve the model, or its configuration is not a reference model's.
        """
        self._served = await self._read_config()
        return self._served.info

    async def embed(self, inputs: Arrays) -> npt.NDArray[np.float32]:
        """Embeds n examples: ``[n, 2, D]`` float32, image before text.

        Raises:
            ReferenceModelError: Not retryable for inputs that the model refuses. Retryable if requests failed in spite
                of repetitions, if the outputs are not what the configuration says, or if Triton serves another
                model than the one that ``info`` told, so that no embedding gets the wrong version's name.
        """
        if self._served is None:
            await self.info()
        served = self._served
        assert served is not None
        examples = count_examples(served.info, inputs)
        embeddings = np.empty((examples, len(OUTPUTS), served.info.embedding_width), np.float32)
        step = min(self._settings.microbatch, served.max_batch_size)
        try:
            async with asyncio.TaskGroup() as group:
                for start in range(0, examples, step):
                    rows = slice(start, start + step)
                    part = {name: array[rows] for name, array in inputs.items()}
                    group.create_task(self._embed_part(served.info, part, embeddings[rows]))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        now = await self._repeating(self._read_config)
        if now != served:
            raise ReferenceModelError(
                f"model {served.info.name} changed from version {served.info.version} to {now.info.version} meanwhile",
                retryable=True,
            )
        return embeddings

    async def fingerprint(self, reference: ReferenceInfo) -> npt.NDArray[np.float32]:
        """Embed the probe examples.

        Raises:
            ReferenceModelError: If they cannot be embedded, or another version is served by now.
        """
        return await embed_probe(self, reference)

    async def ready(self) -> bool:
        """Tells whether one neutral example can be embedded now, within ``ready_timeout_s``.

        Triton's own readiness stays true when the process that runs the model has died. What was embedded since the
        last call is proof enough: a busy model is not asked for more.
        """
        worked, self._worked = self._worked, False
        try:
            async with asyncio.timeout(self._settings.ready_timeout_s):
                info = (await self._read_config()).info
                if worked:
                    return True
                probe = neutral_example(info)
                answer = np.empty((1, len(OUTPUTS), info.embedding_width), np.float32)
                await self._repeating(partial(self._infer, info, probe, answer), on=(Outcome.BUSY,))
        except (ReferenceModelError, TimeoutError) as error:
            _log.info("reference model is not ready", model=self._settings.model, error=str(error))
            return False
        return True

    async def close(self) -> None:
        """Closes the connection."""
        await self._client.close()

    async def _embed_part(self, info: ReferenceInfo, part: Arrays, into: npt.NDArray[np.float32]) -> None:
        async with self._slots:
            await self._repeating(partial(self._infer, info, part, into, norms=True))
        self._worked = True

    async def _infer(
        self, info: ReferenceInfo, part: Arrays, into: npt.NDArray[np.float32], *, norms: bool = False
    ) -> None:
        """Make one request and write its checked answer to `into`, `[n, 2, D]`; `norms` checks those, too."""
        started = time.monotonic()
        outcome = Outcome.FAILED
        traceparent = tracing.traceparent()
        try:
            result = await self._client.infer(
                info.name,
                [_tensor(declared.name, declared.datatype, part[declared.name]) for declared in info.inputs],
                outputs=[triton.InferRequestedOutput(output) for output in OUTPUTS],
                client_timeout=self._settings.timeout_s,
                headers={tracing.HEADER: traceparent} if traceparent else None,
            )
            outcome = Outcome.BROKEN_OUTPUT
            response = self._readable(result.get_response())
            for column, output in enumerate(OUTPUTS):
                array = decode_output(info, output, response, examples=len(into))
                into[:, column] = checked_embedding(info, output, array, examples=len(into))
            if norms:
                check_norms(info, into)
            outcome = Outcome.OK
        except InferenceServerException as error:
            outcome = _outcome_of(error)
            self._fail(error)
        finally:
            self._on_inference(len(into), time.monotonic() - started, outcome)

    async def _read_config(self) -> _Served:
        try:
            answer = await self._client.get_model_config(
                self._settings.model, client_timeout=min(self._settings.timeout_s, self._settings.ready_timeout_s)
            )
        except InferenceServerException as error:
            self._fail(error)
        config: model_config_pb2.ModelConfig = self._readable(answer).config
        if config.name != self._settings.model:
            raise ReferenceModelError(
                f"model {self._settings.model}: the configuration is of {config.name[:_MAX_DETAIL]!r}", retryable=True
            )
        return _Served(reference_info(config), config.max_batch_size)

    def _readable(self, answer: T | None) -> T:
        """Return an answer unless it is what gRPC makes of bytes that are not a message of the right type: None."""
        if answer is None:
            message = f"model {self._settings.model} at {self._settings.url}: the answer is no message of its protocol"
            raise _CallFailed(message, Outcome.BROKEN_OUTPUT)
        return answer

    def _fail(self, error: InferenceServerException) -> NoReturn:
        detail = (error.message() or "")[:_MAX_DETAIL]
        message = f"model {self._settings.model} at {self._settings.url}: {error.status()}: {detail}"
        raise _CallFailed(message, _outcome_of(error)) from error

    async def _repeating(
        self, call: Callable[[], Awaitable[T]], *, on: Collection[Outcome] = (Outcome.BUSY, Outcome.UNAVAILABLE)
    ) -> T:
        """Calls until it works, fails in another way than ``on``, or has been repeated often enough."""
        retrying = AsyncRetrying(
            retry=retry_if_exception(lambda error: isinstance(error, _CallFailed) and error.outcome in on),
            stop=stop_after_attempt(1 + self._settings.retries),
            wait=wait_exponential(_FIRST_WAIT_S, _LONGEST_WAIT_S) + wait_random(0, _JITTER_S),
            before_sleep=_log_repetition,
            reraise=True,
        )
        return await retrying(call)


def _tensor(name: str, datatype: str, array: npt.NDArray[Any]) -> triton.InferInput:
    return triton.InferInput(name, array.shape, datatype).set_data_from_numpy(array)


def _outcome_of(error: InferenceServerException) -> Outcome:
    if _QUEUE_FULL in (error.message() or ""):
        return Outcome.BUSY
    return _OUTCOMES.get(error.status(), Outcome.FAILED)


def _log_repetition(state: RetryCallState) -> None:
    if state.attempt_number == 1:  # what comes of it is in the answer, or in the error
        assert state.outcome is not None
        _log.warning(
            "request to Triton is repeated until it works or is given up", error=str(state.outcome.exception())
        )
