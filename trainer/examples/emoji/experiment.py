"""What is run with which settings: the plan of the demo, and its three trainings."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

from data import EmojiData
from pairs import Batch
from sources import InProcessSelection, PlainSource
from towers import TwoTowers
from training import Run, SelectedSource, Settings, Watcher, new_model, train

from jest_core import SelectionPolicy

LearnerSource = Callable[[TwoTowers], SelectedSource]


@dataclass(frozen=True)
class Plan:
    """Sizes and settings of a demo run; learning rates and steps come from `tune.py`."""

    curated_pairs: int
    super_batch_size: int
    reference: Settings
    uniform: Settings
    jest: Settings

    def policy(self) -> SelectionPolicy:
        """The selection rule: the published method, b pairs out of B."""
        return SelectionPolicy(sub_batch_size=self.jest.batch_size)


FULL = Plan(
    curated_pairs=4000,
    super_batch_size=640,
    reference=Settings(steps=500, learning_rate=5e-3, evaluate_every=50),
    uniform=Settings(steps=800, learning_rate=7e-3),
    jest=Settings(steps=800, learning_rate=7e-3),
)
QUICK = Plan(
    curated_pairs=4000,
    super_batch_size=640,
    reference=Settings(steps=300, learning_rate=5e-3, evaluate_every=50),
    uniform=Settings(steps=200, learning_rate=7e-3, evaluate_every=10),
    jest=Settings(steps=200, learning_rate=7e-3, evaluate_every=10),
)


def train_reference(
    data: EmojiData, plan: Plan, seed: int, pairs: Batch, watcher: Watcher | None = None
) -> tuple[TwoTowers, Run]:
    """Train the reference model on the curated part and freeze it."""
    model = new_model(len(data.vocabulary), _model_seed(seed, "reference"), plan.reference.batch_size)
    source = PlainSource(data.curated_batches(plan.reference.batch_size, seed), len(data.curated))
    run = train("reference", model, source, plan.reference, pairs, watcher)
    return model.requires_grad_(requires_grad=False).eval(), run


def train_uniform(data: EmojiData, plan: Plan, seed: int, pairs: Batch, watcher: Watcher | None = None) -> Run:
    """Train a learner on the stream as it comes."""
    source = PlainSource(data.stream_batches(plan.uniform.batch_size, seed), len(data.stream))
    return train("uniform", new_learner(data, plan, seed), source, plan.uniform, pairs, watcher)


def train_selected(
    data: EmojiData,
    plan: Plan,
    seed: int,
    pairs: Batch,
    source_for: LearnerSource,
    watcher: Watcher | None = None,
) -> Run:
    """Train a learner, equal to uniform's at the start, on sub-batches that were selected for it."""
    learner = new_learner(data, plan, seed)
    with closing(source_for(learner)) as source:
        return train("JEST", learner, source, plan.jest, pairs, watcher)


def in_process(data: EmojiData, plan: Plan, seed: int, reference: TwoTowers) -> LearnerSource:
    """Select without a server."""
    return lambda learner: InProcessSelection(
        data.stream_batches(plan.super_batch_size, seed), len(data.stream), learner, reference, plan.policy(), seed
    )


def new_learner(data: EmojiData, plan: Plan, seed: int) -> TwoTowers:
    """Build the learner that every method starts from."""
    return new_model(len(data.vocabulary), _model_seed(seed, "learner"), plan.uniform.batch_size)


def _model_seed(seed: int, role: str) -> int:
    return 2 * seed + ("reference", "learner").index(role)
