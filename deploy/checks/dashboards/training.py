"""A short real training run against a stack: two jobs over the same data, and a third that meets trouble.

Pairs are noisy views of a few hundred concepts, half of them mismatched. The reference model has learned the concepts
beforehand, so that learnability means something; the learners begin from nothing.
"""

from __future__ import annotations

import threading
import time
import urllib.request
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import jest_trainer as jest
from support import tiny_reference
from support.learner import selected, sigmoid_step
from support.references import export_linear_reference

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from jest_server.local.stack import Stack

WIDTH, WORDS, CONCEPTS, TOKENS = 32, 1000, 300, 8
ROWS, EPOCH = 512, 12
SCALE, BIAS = 12.0, -8.0
Batch = dict[str, Any]


class World:
    """The concepts, and views of them."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._images = torch.rand(CONCEPTS, 3, 32, 32, generator=self._generator)
        self._words = torch.randint(0, WORDS, (CONCEPTS, TOKENS), generator=self._generator, dtype=torch.int32)

    def batch(self, name: str, rows: int, *, mismatched: float = 0.5) -> Batch:
        """Draws pairs of which some do not belong together."""
        concepts = torch.randint(0, CONCEPTS, (rows,), generator=self._generator)
        others = torch.randint(0, CONCEPTS, (rows,), generator=self._generator)
        wrong = torch.rand(rows, generator=self._generator) < mismatched
        noise = torch.rand(rows, 3, 32, 32, generator=self._generator)
        return {
            "keys": [f"{name}-{row}" for row in range(rows)],
            "image": ((0.6 * self._images[concepts] + 0.4 * noise) * 255).to(torch.uint8),
            "tokens": self._words[torch.where(wrong, others, concepts)],
        }


class Learner(nn.Module):
    """The reference's architecture."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.image = tiny_reference.ImageTower(width=WIDTH)
        self.text = tiny_reference.TextTower(width=WIDTH, vocabulary=WORDS)
        self._optimizer = torch.optim.Adam(self.parameters(), lr=2e-3)

    def embed(self, batch: Batch) -> jest.Embeddings:
        """What it makes of a super-batch."""
        return jest.Embeddings(self.image(batch["image"]), self.text(batch["tokens"]), scale=SCALE, bias=BIAS)

    def step(self, batch: Batch) -> None:
        """Trains once, by the sigmoid loss."""
        image, text = self.image(batch["image"]), self.text(batch["tokens"])
        sigmoid_step(self._optimizer, image, text, scale=SCALE, bias=BIAS)


def make_reference(folder: Path, world: World) -> None:
    """Trains the reference model for a moment and makes a model repository of it."""
    model = Learner(seed=1)
    for number in range(150):
        model.step(world.batch(f"reference-{number}", 128, mismatched=0.0))
    export_linear_reference(folder, model.image, model.text, scale=SCALE, bias=BIAS)


class Runs:
    """Training jobs that go on until told to stop; what fails in one of them is raised by ``stop``."""

    def __init__(self, stack: Stack, world: World) -> None:
        self._stack = stack
        self._client = jest.Client(stack.address, deadline_s=30)
        self._stopping = threading.Event()
        self._failures: list[BaseException] = []
        self._threads: list[threading.Thread] = []
        self._world = world
        self._data = [world.batch(f"data-{number}", ROWS) for number in range(EPOCH)]
        self._fresh = iter(range(1_000_000))

    def start(self, job: str, *, pause_s: float, fresh: bool = False) -> None:
        """Starts a job, which every ``pause_s`` seconds looks at a super-batch: of the shared data or of its own."""
        self._run(lambda: self._train(job, pause_s, fresh=fresh))

    def watch_control(self) -> None:
        """Looks at the jobs through the REST service, every second."""
        control = self._stack.control
        assert control is not None
        url = f"http://127.0.0.1:{control.port}/v1/jobs"

        def look() -> None:
            while not self._stopping.wait(1.0):
                with urllib.request.urlopen(url, timeout=10):
                    pass

        self._run(look)

    def meet_trouble(self, job: str) -> None:
        """Lets a fallback choose, a super-batch expire and a call be refused."""
        troubled = self._client.create_job(
            job,
            reference_model="jest_reference",
            policy=jest.SelectionPolicy(filter_ratio=0.75, num_chunks=4),
            reference_timeout_s=0.5,
            fallback="uniform",
            super_batch_ttl_s=1,
        )
        batch = self._world.batch("troubled", ROWS)
        assert self._stack.scorer is not None
        with self._stack.paused("scorer"):
            assert list(selected(troubled, Learner(seed=9), [batch]))
        forgotten = selected(troubled, Learner(seed=9), [self._world.batch("forgotten", ROWS)] * 3, prefix="f-")
        iterator = iter(forgotten)
        next(iterator)  # two more are submitted ahead, and nobody asks for them
        for _ in range(10):
            with suppress(jest.JestError):
                self._client.get_job("nobody")
            time.sleep(0.5)
        forgotten.close()

    def stop(self) -> None:
        """Ends all jobs.

        Raises:
            BaseException: What failed in one of them.
        """
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        self._client.close()
        for failure in self._failures:
            raise failure

    def _train(self, name: str, pause_s: float, *, fresh: bool) -> None:
        job = self._client.create_job(
            name,
            reference_model="jest_reference",
            policy=jest.SelectionPolicy(filter_ratio=0.75, num_chunks=8),
            reference_timeout_s=20,
        )
        learner = Learner(seed=len(name))
        for batch in selected(job, learner, self._batches(fresh=fresh)):
            learner.step(batch)
            if self._stopping.wait(pause_s):
                return

    def _batches(self, *, fresh: bool) -> Iterator[Batch]:
        while not self._stopping.is_set():
            for batch in self._data:
                yield self._world.batch(f"fresh-{next(self._fresh)}", ROWS) if fresh else batch

    def _run(self, work: Any) -> None:
        def guarded() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - told by stop
                self._failures.append(error)

        thread = threading.Thread(target=guarded)
        thread.start()
        self._threads.append(thread)
