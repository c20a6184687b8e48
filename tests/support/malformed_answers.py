"""Answers to an inference of two examples that break Triton's protocol or a model's contract, each in its own way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from tritonclient.grpc import service_pb2

from support.fake_triton import OUTPUTS, WIDTH, good_answer, response_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from google.protobuf.message import Message

    Answer = Callable[[service_pb2.ModelInferRequest], Message | bytes]


def changed(change: Callable[[service_pb2.ModelInferResponse], object]) -> Answer:
    """Return an answer that was good before the change."""

    def answer(request: service_pb2.ModelInferRequest) -> service_pb2.ModelInferResponse:
        response = good_answer(request)
        change(response)
        return response

    return answer


def _content(content: bytes) -> Answer:
    def change(response: service_pb2.ModelInferResponse) -> None:
        response.raw_output_contents[0] = content

    return changed(change)


def _first(**fields: object) -> Answer:
    def change(response: service_pb2.ModelInferResponse) -> None:
        for name, value in fields.items():
            if name == "shape":
                response.outputs[0].shape[:] = value
            else:
                setattr(response.outputs[0], name, value)

    return changed(change)


def _typed_contents(response: service_pb2.ModelInferResponse) -> None:
    for output in response.outputs:
        output.contents.fp32_contents.extend([1.0] * 2 * WIDTH)
    del response.raw_output_contents[:]


def _rows(value: float, count: int = 2) -> Answer:
    return lambda _: response_of(*(np.full((count, WIDTH), value, np.float32) for _ in OUTPUTS))


IMAGE = "model ref: output image_embedding "
MALFORMED: dict[str, tuple[Answer, str]] = {
    "too few bytes": (_content(bytes(31)), IMAGE + "has 31 bytes, expected 32"),
    "too many bytes": (_content(bytes(64)), IMAGE + "has 64 bytes, expected 32"),
    "no bytes": (_content(b""), IMAGE + "has 0 bytes"),
    "no outputs": (lambda _: service_pb2.ModelInferResponse(), IMAGE + "comes 0 times"),
    "one output is missing": (changed(lambda r: r.outputs.pop(0)), IMAGE + "comes 0 times"),
    "one output comes twice": (_first(name="text_embedding"), IMAGE + "comes 0 times"),
    "half precision": (_first(datatype="FP16"), IMAGE + r"is float16 \[2, 4\], expected float32"),
    "strings": (_first(datatype="BYTES"), IMAGE + "is BYTES"),
    "a datatype that there is not": (_first(datatype="N" * 100_000), IMAGE + "is NNN"),
    "rank 1": (_first(shape=[8]), IMAGE + r"is float32 \[8\]"),
    "rank 3": (_first(shape=[2, 2, 2]), IMAGE + r"is float32 \[2, 2, 2\]"),
    "a scalar": (_first(shape=[]), IMAGE + r"is float32 \[\]"),
    "a negative size": (_first(shape=[2, -4]), IMAGE + r"is float32 \[2, -4\]"),
    "a huge size": (_first(shape=[2**62, 2**62]), IMAGE + "is float32"),
    "30,000 dimensions": (_first(shape=[2**62] * 30_000), IMAGE + "is float32"),
    "other rows": (_rows(0.5, count=3), IMAGE + r"is float32 \[3, 4\]"),
    "fewer contents than outputs": (changed(lambda r: r.raw_output_contents.pop()), IMAGE + "is one of 2, but 1 came"),
    "more contents than outputs": (changed(lambda r: r.raw_output_contents.append(b"")), "is one of 2, but 3 came"),
    "contents in typed fields": (changed(_typed_contents), IMAGE + "is one of 2, but 0 came"),
    "no message": (lambda _: b"\xff\xff\xff", "the answer is no message of its protocol"),
    "zeros": (_rows(0), IMAGE + "has norms outside 0.01 to 1000 in 2 of 2 rows"),
    "overflow": (_rows(7e4), IMAGE + "has values beyond float16 in 2 of 2 rows"),
    "NaN": (_rows(np.nan), IMAGE + "has NaN or infinity in 2 of 2 rows, first in row 0"),
}
"""By name: the answer, and what the error says of it."""
