"""JEST Server's SDK: hand it a training loop's super-batches, get back the sub-batches worth training on.

- `Client` talks to one server and makes or finds jobs.
- `Job` is one training run there; its raw calls are for those who write their own loop.
- `SelectedBatches` wraps an iterable of super-batches: what it yields is what to train on.
- `SelectedIndices` makes such a loop the batch sampler of a DataLoader.
- `SelectionPolicy` says how to choose, `Schedule` how a number of it changes with the step.
- `Embeddings`, `PairLosses` or `ExampleLosses` are what the learner says of a super-batch, as the policy's loss wants.
- `JestError` is the one exception for whatever goes wrong between this process and the server.
"""

from jest_core import Embeddings, Schedule, SelectionPolicy
from jest_trainer.batch_sampler import SelectedIndices
from jest_trainer.client import Client
from jest_trainer.errors import JestError
from jest_trainer.job import Job
from jest_trainer.loader import SelectedBatches
from jest_trainer.outputs import ExampleLosses, PairLosses

__all__ = [
    "Client",
    "Embeddings",
    "ExampleLosses",
    "JestError",
    "Job",
    "PairLosses",
    "Schedule",
    "SelectedBatches",
    "SelectedIndices",
    "SelectionPolicy",
]
