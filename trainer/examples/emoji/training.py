"""The training loop, the same for every method: only where the sub-batches come from differs.

Shapes: n = pairs of a batch, D = embedding width.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from pairs import Batch
from torch import Tensor
from torch.nn import functional
from towers import TwoTowers

MAX_SCALE = 100.0


@dataclass(frozen=True)
class Settings:
    """How a model is trained: the learning rate rises over `warmup_steps` and falls along a half cosine to zero."""

    steps: int
    learning_rate: float
    batch_size: int = 128
    warmup_steps: int = 40
    weight_decay: float = 1e-4
    evaluate_every: int = 20


class Account:
    """What it cost to come by the sub-batches of a run, and which pairs of the pool were seen and trained on.

    Seconds are wall-clock: `scoring_seconds` the learner's own part of selection, `waiting_seconds` the time that
    the training loop stood still for an answer from elsewhere.
    """

    def __init__(self, pool_size: int) -> None:
        self.examples_loaded = 0
        self.examples_trained = 0
        self.learner_seconds = 0.0
        self.scoring_seconds = 0.0
        self.waiting_seconds = 0.0
        self.reference_inferences = 0
        self.cache_hits = 0
        self.times_seen = torch.zeros(pool_size, dtype=torch.int64)
        self.times_trained = torch.zeros(pool_size, dtype=torch.int64)

    def counting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Pass batches through, counting every pair as loaded."""
        for batch in batches:
            self.examples_loaded += len(batch["keys"])
            self._add(self.times_seen, batch)
            yield batch

    def count_trained(self, batch: Batch) -> None:
        """Count the pairs of a sub-batch as trained on."""
        self.examples_trained += len(batch["keys"])
        self._add(self.times_trained, batch)

    def totals(self) -> dict[str, float]:
        """Every figure but the counts per pair."""
        return {name: value for name, value in vars(self).items() if not isinstance(value, Tensor)}

    @staticmethod
    def _add(times: Tensor, batch: Batch) -> None:
        times += torch.bincount(batch["index"], minlength=len(times))


class BatchSource(Protocol):
    """Hands out the sub-batches to train on, one per step, and keeps account of where they came from."""

    account: Account

    def __next__(self) -> Batch:
        """Load, and perhaps select, the next sub-batch for the model as it is now."""


class SelectedSource(BatchSource, Protocol):
    """A source that selects, and may hold something while it does."""

    def close(self) -> None:
        """Let go of it."""


@dataclass(frozen=True)
class Retrieval:
    """Recall at one over a set of pairs: how often the nearest caption, or picture, is the right one."""

    image_to_text: float
    text_to_image: float

    @property
    def mean(self) -> float:
        """Both directions together: the figure that is compared."""
        return (self.image_to_text + self.text_to_image) / 2


@dataclass(frozen=True)
class Point:
    """One evaluation during a run; `seconds` leaves out the time that evaluations took."""

    step: int
    examples_loaded: int
    examples_trained: int
    seconds: float
    loss: float
    retrieval: Retrieval


class Watcher(Protocol):
    """Somebody who wants to know how a run is going."""

    def on_step(self, step: int, loss: float) -> None:
        """Hear of a finished step."""

    def on_point(self, point: Point) -> None:
        """Hear of an evaluation."""


@dataclass
class Run:
    """A training run: what was asked for, what it cost, how retrieval grew."""

    name: str
    settings: Settings
    account: Account
    points: list[Point] = field(default_factory=list)

    @property
    def final(self) -> Point:
        """The evaluation after the last step."""
        return self.points[-1]

    def reach(self, retrieval: float) -> Point | None:
        """Find the evaluation from which on this run retrieved at least so well for good; None if there is none."""
        reached = None
        for point in reversed(self.points):
            if point.retrieval.mean < retrieval:
                break
            reached = point
        return reached


def sigmoid_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP's loss (arXiv 2303.15343, eq. 1): n images and texts ``[n, D]``, each against all, summed, over n."""
    logits = scale * image @ text.T + bias
    signs = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -functional.logsigmoid(signs * logits).sum() / len(logits)


@torch.inference_mode()
def measure_retrieval(model: TwoTowers, pairs: Batch) -> Retrieval:
    """Look every picture's caption up among all captions, and every caption's picture among all pictures."""
    image, text = model(pairs["image"], pairs["tokens"])
    similarity = image @ text.T
    right = torch.arange(len(similarity))
    return Retrieval(
        image_to_text=(similarity.argmax(dim=1) == right).double().mean().item(),
        text_to_image=(similarity.argmax(dim=0) == right).double().mean().item(),
    )


def new_model(vocabulary: int, seed: int, batch_size: int) -> TwoTowers:
    """Build a model whose weights depend on `seed` alone; at first one pair in `batch_size` is judged to match."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TwoTowers(vocabulary=vocabulary, scale=10.0, bias=math.log(1 / batch_size))


def train(
    name: str,
    model: TwoTowers,
    source: BatchSource,
    settings: Settings,
    pairs: Batch,
    watcher: Watcher | None = None,
) -> Run:
    """Train `model` for `settings.steps` sub-batches of `source`, measuring retrieval on `pairs` on the way."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings))
    run = Run(name, settings, source.account)
    seconds = 0.0
    for step in range(1, settings.steps + 1):
        started = time.perf_counter()
        batch = next(source)
        handed_over = time.perf_counter()
        loss = _step(model, batch, optimizer)
        schedule.step()
        finished = time.perf_counter()
        run.account.learner_seconds += finished - handed_over
        run.account.count_trained(batch)
        seconds += finished - started
        if watcher is not None:
            watcher.on_step(step, loss)
        if step % settings.evaluate_every == 0 or step == settings.steps:
            retrieval = measure_retrieval(model, pairs)
            loaded, trained = run.account.examples_loaded, run.account.examples_trained
            run.points.append(Point(step, loaded, trained, seconds, loss, retrieval))
            if watcher is not None:
                watcher.on_point(run.final)
    return run


def _rate(step: int, settings: Settings) -> float:
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return (1 + math.cos(math.pi * min(done, 1.0))) / 2


def _step(model: TwoTowers, batch: Batch, optimizer: torch.optim.Optimizer) -> float:
    image, text = model(batch["image"], batch["tokens"])
    loss = sigmoid_loss(image, text, model.log_scale.exp(), model.bias)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        model.log_scale.clamp_(max=math.log(MAX_SCALE))
    return loss.item()
