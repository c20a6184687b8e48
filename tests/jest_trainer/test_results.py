from __future__ import annotations

import dataclasses

import pytest
import torch
from trainer_samples import super_batch

import jest_trainer as jest

META = torch.device("meta")


@pytest.fixture
def decision(make_loop, client):
    policy = jest.SelectionPolicy(filter_ratio=0.75, num_chunks=2, weights=True)
    job = client.create_job("weighted", reference_model="reference", policy=policy)
    ((_, decision),) = make_loop([super_batch(0)], job=job, return_reference_embeddings=True).with_decisions()
    return decision


def test_a_decision_goes_to_a_device_with_all_its_tensors(decision):
    # This is how accelerate moves it; Lightning calls it without the keyword.
    for moved in (decision.to(META, non_blocking=True), decision.to("meta")):
        tensors = [moved.positions, moved.weights, *moved.reference_embeddings]
        assert {tensor.device for tensor in tensors} == {META}
        assert moved.super_batch_id == decision.super_batch_id
    assert decision.weights.device.type == "cpu"


def test_a_decision_without_weights_and_reference_embeddings_goes_to_a_device_too(decision):
    bare = dataclasses.replace(decision, weights=None, reference_embeddings=None).to(META)
    assert (bare.positions.device, bare.weights, bare.reference_embeddings) == (META, None, None)


def test_a_device_that_does_not_exist_is_an_error(decision):
    with pytest.raises(RuntimeError, match="device"):
        decision.to("nowhere")
