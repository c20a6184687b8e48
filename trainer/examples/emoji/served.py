"""JEST through the running stack: the reference model in Triton, the selector over gRPC, the queue in Valkey.

`ServerSelection` is all that a training loop needs; the rest of this file brings the reference model into Triton and
starts the stack on this machine.
"""

import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import towers
from data import EmojiData
from experiment import LearnerSource, Plan
from pairs import Batch
from prometheus_client.parser import text_string_to_metric_families
from towers import TwoTowers
from training import Account

import jest_trainer as jest
from jest_server.domain.references import ReferenceInput
from jest_server.local.stack import Stack
from jest_server.reference.export import ReferenceExport, Tower, export_reference

REFERENCE = "jest_reference"
PREFETCH = 3


class ServerSelection:
    """Sub-batches that the server chose: the training loop's own side of JEST."""

    def __init__(self, super_batches: Iterator[Batch], pool_size: int, learner: TwoTowers, job: jest.Job) -> None:
        self.account = Account(pool_size)
        self._selected = jest.SelectedBatches(
            job,
            self.account.counting(super_batches),
            keys=lambda batch: batch["keys"],
            features=lambda batch: {"image": batch["image"], "tokens": batch["tokens"]},
            embed=lambda batch: embed(learner, batch),
            prefetch=PREFETCH,
        )
        self._batches = iter(self._selected)

    def __next__(self) -> Batch:
        batch = next(self._batches)
        stats = self._selected.stats
        self.account.scoring_seconds = stats.embed_seconds
        self.account.waiting_seconds = stats.select_seconds + stats.submit_wait_seconds
        self.account.reference_inferences = stats.reference_inferences
        self.account.cache_hits = stats.cache_hits
        return batch

    def close(self) -> None:
        """Stop loading and submitting ahead."""
        self._selected.close()


def embed(learner: TwoTowers, batch: Batch) -> jest.Embeddings:
    """What the learner makes of a super-batch now; 16 bits are enough to choose by, and half the bytes to send."""
    image, text = learner(batch["image"], batch["tokens"])
    return jest.Embeddings(image.half(), text.half(), scale=learner.log_scale.exp(), bias=learner.bias)


def served(data: EmojiData, plan: Plan, seed: int, client: jest.Client) -> LearnerSource:
    """Select through the stack, as a job of its own.

    Raises:
        ValueError: The stack's reference model takes other pixels or tokens than these.
    """
    name = f"emoji-demo-{time.time_ns():x}"  # a running stack remembers what was decided for the last demo
    job = client.create_job(name, reference_model=REFERENCE, policy=plan.policy(), seed=seed)
    _check_preparation(job, data)
    batches = data.stream_batches(plan.super_batch_size, seed)
    return lambda learner: ServerSelection(batches, len(data.stream), learner, job)


def _check_preparation(job: jest.Job, data: EmojiData) -> None:
    served_id = job.reference.preprocessing_id if job.reference else data.preprocessing_id
    if served_id != data.preprocessing_id:
        raise ValueError(f"the reference model takes {served_id}, expected {data.preprocessing_id}: same seed?")


@contextmanager
def running_stack(
    reference: TwoTowers, data: EmojiData, work_dir: Path, on_event: Callable[[str], None]
) -> Iterator[Stack]:
    """Bring the reference model into a model repository under `work_dir` and run the whole stack on it."""
    export(reference, data, work_dir / "model_repository")
    with Stack(work_dir / "model_repository", data_dir=work_dir / "stack", on_event=on_event) as stack:
        yield stack


def export(reference: TwoTowers, data: EmojiData, folder: Path) -> None:
    """Write the reference model as Triton serves it: towers.py, both towers' weights, scale, bias and ids."""
    picture, caption = data.test.everything()["image"], data.test.everything()["tokens"]
    width = reference.image.project.out_features
    export_reference(
        ReferenceExport(
            image=Tower(
                "towers:ImageTower",
                reference.image.state_dict(),
                (ReferenceInput(name="image", datatype="UINT8", shape=tuple(picture.shape[1:])),),
                {"width": width},
            ),
            text=Tower(
                "towers:TextTower",
                reference.text.state_dict(),
                (ReferenceInput(name="tokens", datatype="INT32", shape=tuple(caption.shape[1:])),),
                {"width": width, "vocabulary": len(data.vocabulary)},
            ),
            architecture=Path(towers.__file__),
            scale=reference.log_scale.exp().item(),
            bias=reference.bias.item(),
            embedding_width=width,
            preprocessing_id=data.preprocessing_id,
        ),
        folder,
    )


def counted_inference(stack: Stack) -> str:
    """Who embedded for the reference model, with Triton's own count, which includes readiness probes."""
    if stack.triton is None:
        return "the scorer itself: " + "; ".join(stack.stand_ins)
    with urllib.request.urlopen(stack.triton.metrics_url, timeout=5) as answer:  # noqa: S310 - our own loopback URL
        families = list(text_string_to_metric_families(answer.read().decode()))
    counts = {
        sample.labels["model"]: int(sample.value)
        for family in families
        for sample in family.samples
        if family.name == "nv_inference_count"
    }
    made = counts.get("jest_image_encoder", 0)
    return f"Triton, which by its own count made {made:,} inferences, readiness probes included"
