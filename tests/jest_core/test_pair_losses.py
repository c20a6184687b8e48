import numpy as np
import pytest
import torch

from jest_core.pair_losses import matching_loss, mismatched_loss_

LOGITS = torch.tensor([-1e4, -100.0, -20.5, -1.0, 0.0, 1e-6, 3.0, 19.5, 20.5, 100.0, 1e4])

TINY = 1e-38  # below it float32 numbers lose their precision


def test_a_matching_pair_costs_softplus_of_minus_its_logit():
    expected = np.logaddexp(0, -LOGITS.double().numpy())
    np.testing.assert_allclose(matching_loss(LOGITS).numpy(), expected, rtol=3e-7, atol=TINY)


def test_a_mismatched_pair_costs_softplus_of_its_logit():
    expected = np.logaddexp(0, LOGITS.double().numpy())
    np.testing.assert_allclose(
        mismatched_loss_(LOGITS.clone(), torch.zeros(())).numpy(), expected, rtol=3e-7, atol=TINY
    )


def test_mismatched_losses_are_written_over_their_logits():
    logits = torch.zeros(3)
    losses = mismatched_loss_(logits, torch.zeros(()))
    assert losses.data_ptr() == logits.data_ptr()
    assert float(logits[0]) == pytest.approx(np.log(2))
