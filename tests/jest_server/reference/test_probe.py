from __future__ import annotations

from hashlib import sha256

import numpy as np
import pytest

from jest_server.domain.errors import ReferenceModelError
from jest_server.domain.references import ReferenceInput
from jest_server.reference.arrays import count_examples
from jest_server.reference.in_process import InProcessReferenceModel
from jest_server.reference.probe import LARGEST_TOKEN, OPEN_LENGTH, PROBES, embed_probe, probe_examples
from jest_wire.tensors import DATATYPES
from support.super_batches import REFERENCE, reference_of_pictures

PICTURES = reference_of_pictures(side=224)


def test_probes_are_examples_that_the_model_takes():
    probes = probe_examples(PICTURES)
    assert count_examples(PICTURES, probes) == PROBES
    assert probes["tokens"].shape == (PROBES, OPEN_LENGTH)
    assert (probes["tokens"].min(), probes["tokens"].max()) >= (1, 1)
    assert probes["tokens"].max() <= LARGEST_TOKEN


def test_probes_differ_and_fill_the_range_of_pictures():
    pictures = probe_examples(PICTURES)["image"].reshape(PROBES, -1)
    assert len({row.tobytes() for row in pictures}) == PROBES
    assert len({row[:8].tobytes() for row in pictures}) == PROBES
    assert (pictures.min(), pictures.max()) == (0, 255)


@pytest.mark.parametrize("datatype", DATATYPES)
def test_every_datatype_has_finite_probes(datatype):
    info = REFERENCE.model_copy(update={"inputs": (ReferenceInput(name="x", datatype=datatype, shape=(-1, 5)),)})
    probes = probe_examples(info)
    assert count_examples(info, probes) == PROBES
    assert np.isfinite(probes["x"].astype(np.float32)).all()
    assert np.abs(probes["x"].astype(np.float32)).max() <= 255


def test_probes_are_the_same_in_every_release():
    """Recorded fingerprints are answers to these very numbers."""
    inputs = tuple(ReferenceInput(name=name, datatype=name, shape=(7,)) for name in ("UINT8", "INT32", "FP32", "FP16"))
    probes = probe_examples(REFERENCE.model_copy(update={"inputs": inputs}))
    assert sha256(b"".join(array.tobytes() for array in probes.values())).hexdigest()[:16] == "123fde6ba3270c7b"


async def test_a_model_that_takes_no_such_rows_answers_the_neutral_example():
    class Strict:
        async def embed(self, inputs):
            if inputs["x"].any():
                raise ReferenceModelError("no such tokens", retryable=False, divisible=True)
            return np.ones((len(inputs["x"]), 2, 2), np.float32)

    assert (await embed_probe(Strict(), REFERENCE)).shape == (1, 2, 2)


async def test_a_model_that_is_away_has_no_fingerprint():
    class Away:
        async def embed(self, inputs):
            raise ReferenceModelError(f"away {len(inputs)}", retryable=True)

    with pytest.raises(ReferenceModelError, match="away"):
        await embed_probe(Away(), REFERENCE)


async def test_a_real_model_has_the_same_fingerprint_whichever_adapter_takes_it(reference_repository):
    model = InProcessReferenceModel(reference_repository)
    info = await model.info()
    first = await model.fingerprint(info)
    assert first.shape == (PROBES, 2, info.embedding_width)
    np.testing.assert_allclose(first, await model.embed(probe_examples(info)), atol=1e-6)
    await model.close()
