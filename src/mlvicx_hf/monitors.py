"""What tells learning from collapse without labels."""

from __future__ import annotations

import torch
from torch import Tensor


def rankme(embeddings: Tensor, epsilon: float = 1e-7) -> float:
    """Effective rank of a set of embeddings: RankMe (arXiv 2210.02885), Eq. 1 there.

    Args:
        embeddings: [N, D].
        epsilon: added to the shares of the singular values, as in the paper.

    Returns:
        Between 1 (collapsed to a line, or to zero) and min(N, D).
    """
    singular = torch.linalg.svdvals(embeddings.double())
    shares = singular / singular.sum().clamp(min=torch.finfo(torch.float64).tiny) + epsilon
    return float((-(shares * shares.log()).sum()).exp())
