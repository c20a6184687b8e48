"""Where sub-batches come from: straight from the stream, or chosen out of super-batches."""

import time
from collections.abc import Iterator

import torch
from pairs import Batch, take
from torch import Tensor
from towers import TwoTowers
from training import Account

from jest_core import Embeddings, SelectionPolicy, select_sub_batch, selection_seed


class PlainSource:
    """Train on what comes: every batch of an iterator is a sub-batch."""

    def __init__(self, batches: Iterator[Batch], pool_size: int) -> None:
        self.account = Account(pool_size)
        self._batches = self.account.counting(batches)

    def __next__(self) -> Batch:
        return next(self._batches)


class InProcessSelection:
    """JEST without a server: the same selection, with the reference model in this very process.

    The reference's embeddings are remembered by example key, as the server's cache does.
    """

    def __init__(
        self,
        super_batches: Iterator[Batch],
        pool_size: int,
        learner: TwoTowers,
        reference: TwoTowers,
        policy: SelectionPolicy,
        seed: int,
    ) -> None:
        self.account = Account(pool_size)
        self._super_batches = self.account.counting(super_batches)
        self._learner = learner
        self._reference = reference
        self._policy = policy
        self._seed = seed
        self._embedded: dict[str, tuple[Tensor, Tensor]] = {}
        self._step = 0

    def __next__(self) -> Batch:
        loaded = next(self._super_batches)
        started = time.perf_counter()
        with torch.inference_mode():
            chosen = select_sub_batch(
                _as_embeddings(self._learner, *self._learner(loaded["image"], loaded["tokens"])),
                _as_embeddings(self._reference, *self._embed_once(loaded)),
                self._policy,
                seed=selection_seed(self._seed, self._step),
                example_keys=loaded["keys"],
            ).positions
        self.account.scoring_seconds += time.perf_counter() - started
        self._step += 1
        return take(loaded, chosen)

    def close(self) -> None:
        """Forget the reference's embeddings."""
        self._embedded.clear()

    def _embed_once(self, batch: Batch) -> tuple[Tensor, Tensor]:
        missing = {key: row for row, key in enumerate(batch["keys"]) if key not in self._embedded}
        self.account.reference_inferences += len(missing)
        self.account.cache_hits += len(batch["keys"]) - len(missing)
        if missing:
            rows = torch.tensor(list(missing.values()))
            images, texts = self._reference(batch["image"][rows], batch["tokens"][rows])
            self._embedded.update(zip(missing, zip(images, texts, strict=True), strict=True))
        images, texts = zip(*(self._embedded[key] for key in batch["keys"]), strict=True)
        return torch.stack(images), torch.stack(texts)


def _as_embeddings(model: TwoTowers, image: Tensor, text: Tensor) -> Embeddings:
    return Embeddings(image=image, text=text, scale=model.log_scale.exp().item(), bias=model.bias.item())
