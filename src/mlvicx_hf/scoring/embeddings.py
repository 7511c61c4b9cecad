"""Measures of embeddings [N, D] that tell learning from collapse without labels, in float64."""

import torch
from torch import Tensor

EPSILON = 1e-7  # added to the shares of the singular values, as in the paper of RankMe
MAX_DIMENSIONS = 512  # of which `mean_correlation` takes all pairs


def rankme(embeddings: Tensor) -> float:
    """Effective rank of a set of embeddings: RankMe (arXiv 2210.02885), Eq. 1 there.

    The singular values come from the eigenvalues of the smaller Gram matrix. This is faster than a singular value
    decomposition, and less exact only for values below 1e-7 of the largest, where `EPSILON` dominates.

    Args:
        embeddings: [N, D], not centred.

    Returns:
        Between 1 (collapsed to a line, or to zero) and min(N, D).
    """
    values = embeddings.double()
    values = values / values.abs().max().clamp(min=torch.finfo(torch.float64).tiny)  # so that no square overflows
    gram = values @ values.T if values.shape[0] <= values.shape[1] else values.T @ values
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    shares = singular / singular.sum().clamp(min=torch.finfo(torch.float64).tiny) + EPSILON
    return float((-(shares * shares.log()).sum()).exp())


def mean_standard_deviation(embeddings: Tensor) -> float:
    """Standard deviation over the samples, averaged over the dimensions: 0 when all samples are the same point.

    Args:
        embeddings: [N, D], N of 2 or more; the variance loss pulls the deviation of each dimension above its target.
    """
    values = embeddings.double()
    squares = (values - values.mean(0)).square().sum(0)  # some five times faster than std
    return float((squares / (len(values) - 1)).sqrt().mean())


def mean_correlation(embeddings: Tensor) -> float:
    """Absolute correlation of two dimensions, averaged over the pairs: 1 if all dimensions are the same.

    If there are more than 512 dimensions, take 512 evenly spaced ones: 130,816 pairs, a sixteenth of the work for 2048
    dimensions. Dimensions that never vary have no correlation and are left out.

    Args:
        embeddings: [N, D].

    Returns:
        Between 0 and 1; independent dimensions give about 0.8 / sqrt(N), not 0. 0 if fewer than two dimensions vary.
    """
    values = embeddings.double()
    if values.shape[1] > MAX_DIMENSIONS:
        values = values[:, torch.linspace(0, values.shape[1] - 1, MAX_DIMENSIONS).round().long()]
    centred = values - values.mean(0)
    length = centred.norm(dim=0)
    varying = length > 1e-6 * values.norm(dim=0)  # what is left of a constant is rounding
    count = int(varying.sum())
    if count < 2:
        return 0.0
    units = (centred[:, varying] / length[varying]).float()  # enough for values up to 1
    return (float((units.T @ units).abs().sum()) - count) / (count * (count - 1))


def describe_embeddings(name: str, embeddings: Tensor, centre: bool = False) -> dict[str, float]:
    """`{name}_rankme`, `{name}_deviation` and `{name}_correlation` of embeddings.

    Nothing of fewer than two, and nothing if one is not finite: the loss of the next step reports that.

    Args:
        name: of what they are.
        embeddings: [N, D].
        centre: take RankMe of the differences from the mean, for features after a ReLU, whose mean dominates.
    """
    values = embeddings.cpu().double()  # small; not every accelerator has float64
    if values.shape[0] < 2 or not values.isfinite().all():
        return {}
    return {
        f"{name}_rankme": rankme(values - values.mean(0) if centre else values),
        f"{name}_deviation": mean_standard_deviation(values),
        f"{name}_correlation": mean_correlation(values),
    }
