"""A reference model that is one Triton model, not an ensemble: it gives its input back, after a while.

For tests of what a full queue does. Triton loads this file as the model's model.py.
"""

from __future__ import annotations

import time

NAME = "slow_reference"
EXECUTION_S = 0.1
CONFIG = f"""
name: "{NAME}" backend: "python" max_batch_size: 1
input [ {{ name: "number" data_type: TYPE_FP32 dims: [ 1 ] }} ]
output [
  {{ name: "image_embedding" data_type: TYPE_FP32 dims: [ 1 ] }},
  {{ name: "text_embedding" data_type: TYPE_FP32 dims: [ 1 ] }}
]
instance_group [ {{ kind: KIND_CPU }} ]
dynamic_batching {{ default_queue_policy {{ max_queue_size: 1 }} }}
parameters {{ key: "jest_scale" value: {{ string_value: "1" }} }}
parameters {{ key: "jest_bias" value: {{ string_value: "0" }} }}
parameters {{ key: "jest_version" value: {{ string_value: "1" }} }}
parameters {{ key: "jest_preprocessing_id" value: {{ string_value: "none" }} }}
"""


class TritonPythonModel:
    def execute(self, requests):
        import triton_python_backend_utils as pb  # noqa: PLC0415 - there is none outside of Triton

        time.sleep(EXECUTION_S)
        numbers = [pb.get_input_tensor_by_name(request, "number") for request in requests]
        return [
            pb.InferenceResponse(
                output_tensors=[
                    pb.Tensor.from_dlpack("image_embedding", number.to_dlpack()),
                    pb.Tensor.from_dlpack("text_embedding", number.to_dlpack()),
                ]
            )
            for number in numbers
        ]
