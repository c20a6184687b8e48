"""JEST Server's SDK: hand it a training loop's super-batches, get back the sub-batches worth training on.

- `Client` talks to one server and makes or finds jobs.
- `Job` is one training run there; its raw calls are for those who write their own loop.
- `SelectedBatches` wraps an iterable of super-batches: what it yields is what to train on.
- `SelectionPolicy` says how to choose, `Embeddings` what the learner thinks of a super-batch.
- `JestError` is the one exception for whatever goes wrong between this process and the server.
"""

from jest_core import Embeddings, SelectionPolicy
from jest_trainer.client import Client
from jest_trainer.errors import JestError
from jest_trainer.job import Job
from jest_trainer.loader import SelectedBatches

__all__ = [
    "Client",
    "Embeddings",
    "JestError",
    "Job",
    "SelectedBatches",
    "SelectionPolicy",
]
