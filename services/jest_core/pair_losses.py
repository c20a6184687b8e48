"""The sigmoid loss of one image-text pair, as a function of its logit (SigLIP, arXiv 2303.15343, equation 1).

A pair's loss depends on that pair alone, so the loss of a batch is a plain sum over its pairs. Joint selection
leans on this: what a newly chosen pair adds can be computed by itself.
"""

import torch
from torch import Tensor


def matching_loss(logits: Tensor) -> Tensor:
    """The loss of pairs that belong together: softplus(-x)."""
    return torch.logaddexp(-logits, logits.new_zeros(()))


def mismatched_loss_(logits: Tensor, zero: Tensor) -> Tensor:
    """The loss of pairs that do not belong together, softplus(x), in place; `zero` is a 0-d zero beside them.

    log(e^x + e^0) is the softplus that has an in-place form and needs no linear branch for large x.
    """
    return torch.logaddexp(logits, zero, out=logits)
