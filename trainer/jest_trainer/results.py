"""What the raw calls return: the contract's answers as small immutable values, times in seconds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Fallback = Literal["fail", "uniform", "hard_learner"]


@dataclass(frozen=True, slots=True)
class ReferenceInput:
    """One tensor that the reference model takes for an example; -1 in `shape` stands for any length."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ReferenceModel:
    """What the reference model's own configuration says: logit = scale * <image, text> + bias."""

    name: str
    version: str
    preprocessing_id: str
    scale: float
    bias: float
    embedding_width: int
    inputs: tuple[ReferenceInput, ...]


@dataclass(frozen=True, slots=True)
class Counters:
    """A job's accounts over all ranks; submitted == selected + dead_lettered + in_flight at every moment."""

    submitted: int
    selected: int
    dead_lettered: int
    in_flight: int
    fallbacks: int
    examples_loaded: int
    examples_selected: int
    cache_hits: int
    reference_inferences: int


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """A server's version, limits and abilities."""

    version: str
    scorings: tuple[str, ...]
    losses: tuple[str, ...]
    learner_datatypes: tuple[str, ...]
    max_rows_per_rank: int
    max_tensor_bytes: int
    max_message_bytes: int
    max_world_size: int
    max_pair_loss_bytes: int
    precisions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Submitted:
    """The answer to a submission: the rows whose features must be uploaded, and what the reference model takes.

    `reference` is None for a job without a reference model.
    """

    missing_positions: tuple[int, ...]
    reference: ReferenceModel | None
    decided: bool


@dataclass(frozen=True, slots=True)
class StageTimings:
    """Where the time of a selection went on the server, in seconds."""

    wait_learner: float
    wait_reference: float
    queue: float
    compute: float
    record: float


class ReferenceEmbeddings(NamedTuple):
    """The reference model's embeddings of the chosen rows, `[chosen, D]` each, in their order."""

    image: Tensor
    text: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class SubBatch:
    """A decision, as one rank sees it.

    Attributes:
        positions: int64 `[chosen]`, this rank's rows in order of choice.
        sub_batch_size: b, over all ranks.
        super_batch_size: B, over all ranks.
        cache_hits: rows of the super-batch, all ranks together, whose reference embeddings were cached.
        reference_inferences: examples of the super-batch, all ranks together, that the reference model had to embed.
        perplexity: how many rows each chunk's sampler really chose among.
        fallback: the rule that was used instead of the policy, None if none was needed.
        reference_embeddings: None unless asked for; also None after a fallback, and when the decision had been recorded
            before, as after a resume: decisions are kept, embeddings are not.
        weights: float32 `[chosen]` in the order of `positions`, None unless the policy asks for them: what each row is
            worth inside the sub-batch. None is negative, and over all ranks together their mean is 1.
        gain: the policy's, at this step.

    To distil from the reference model while training on what it chose (ACED, arXiv 2411.18674), add the cross-entropy
    between its matching of the chosen images and texts and the learner's to the loss; for a `job`, a `decision` of a
    loop made with `return_reference_embeddings=True`, and the learner's `image`, `text` and `scale` for its batch:

        >>> teacher = decision.reference_embeddings
        >>> target = job.reference.scale * teacher.image.to(image) @ teacher.text.to(text).T
        >>> logits = scale * image @ text.T
        >>> rows = functional.cross_entropy(logits, target.softmax(1))
        >>> columns = functional.cross_entropy(logits.T, target.T.softmax(1))
        >>> distillation = (rows + columns) / 2
    """

    super_batch_id: str
    positions: Tensor
    sub_batch_size: int
    super_batch_size: int
    reference_version: str
    cache_hits: int
    reference_inferences: int
    perplexity: tuple[float, ...]
    timings: StageTimings
    fallback: str | None
    fallback_reason: str
    reference_embeddings: ReferenceEmbeddings | None
    weights: Tensor | None
    gain: float

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> Self:
        """Return the decision with its tensors on a device; trainers call this on whatever is in a batch."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        teacher = self.reference_embeddings
        return replace(
            self,
            positions=moved(self.positions),
            weights=None if self.weights is None else moved(self.weights),
            reference_embeddings=None
            if teacher is None
            else ReferenceEmbeddings(*[moved(tensor) for tensor in teacher]),
        )
