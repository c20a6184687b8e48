"""A gRPC server that speaks Triton's protocol and answers whatever a test wants, well-formed or not."""

from __future__ import annotations

import uuid
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc
import grpc.aio
import numpy as np
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2, service_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from google.protobuf.message import Message

    Answer = Callable[[service_pb2.ModelInferRequest], Message | bytes]

OUTPUTS = ("image_embedding", "text_embedding")
WIDTH = 4
CONFIG = f"""
name: "ref" max_batch_size: 8
input [ {{ name: "x" data_type: TYPE_INT64 dims: [ 1 ] }} ]
output [
  {{ name: "image_embedding" data_type: TYPE_FP32 dims: [ {WIDTH} ] }},
  {{ name: "text_embedding" data_type: TYPE_FP32 dims: [ {WIDTH} ] }}
]
parameters {{ key: "jest_scale" value: {{ string_value: "1" }} }}
parameters {{ key: "jest_bias" value: {{ string_value: "0" }} }}
parameters {{ key: "jest_version" value: {{ string_value: "1" }} }}
parameters {{ key: "jest_preprocessing_id" value: {{ string_value: "p" }} }}
"""


class FakeTriton:
    """Serves one model; `answer` and `config` may be replaced at any time, `status` refuses inferences."""

    def __init__(self) -> None:
        self.url = ""
        self.answer: Answer = good_answer
        self.config: Message | bytes = good_config(uuid.uuid4().hex)
        self.status: tuple[grpc.StatusCode, str] | None = None
        self.inferences = 0

    async def _infer(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        self.inferences += 1
        if self.status is not None:
            await context.abort(*self.status)
        return _serialized(self.answer(service_pb2.ModelInferRequest.FromString(request)))

    async def _config(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        del request, context
        return _serialized(self.config)


@asynccontextmanager
async def fake_triton() -> AsyncIterator[FakeTriton]:
    """Serve a fake Triton on a free port for the length of the block."""
    fake, server = FakeTriton(), grpc.aio.server()
    methods = {
        "ModelInfer": grpc.unary_unary_rpc_method_handler(fake._infer),
        "ModelConfig": grpc.unary_unary_rpc_method_handler(fake._config),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("inference.GRPCInferenceService", methods),))
    fake.url = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield fake
    finally:
        await server.stop(None)


def good_config(version: str = "1") -> service_pb2.ModelConfigResponse:
    """Return the configuration of a model that takes one number for an example."""
    answer = service_pb2.ModelConfigResponse(config=text_format.Parse(CONFIG, model_config_pb2.ModelConfig()))
    answer.config.parameters["jest_version"].string_value = version
    return answer


def numbers_of(request: service_pb2.ModelInferRequest) -> list[int]:
    """Return the numbers that a request asks to embed."""
    return np.frombuffer(request.raw_input_contents[0], np.int64).tolist()


def good_answer(request: service_pb2.ModelInferRequest) -> service_pb2.ModelInferResponse:
    """Embed x to unit rows that turn with x, the text a little behind the image."""
    angles = np.array(numbers_of(request), np.float32)
    return response_of(*(_turned(angles - behind) for behind in (0.0, 0.1)))


def response_of(*rows: np.ndarray, names: tuple[str, ...] = OUTPUTS) -> service_pb2.ModelInferResponse:
    """Return the well-formed response with these rows as its outputs."""
    response = service_pb2.ModelInferResponse(model_name="ref")
    for name, array in zip(names, rows, strict=True):
        response.outputs.add(name=name, datatype="FP32", shape=array.shape)
        response.raw_output_contents.append(array.astype("<f4").tobytes())
    return response


def _turned(angles: np.ndarray) -> np.ndarray:
    rows = np.zeros((len(angles), WIDTH), np.float32)
    rows[:, 0], rows[:, 1] = np.cos(angles), np.sin(angles)
    return rows


def _serialized(answer: Message | bytes) -> bytes:
    return answer if isinstance(answer, bytes) else answer.SerializeToString()
