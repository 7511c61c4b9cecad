"""Nearest neighbours and a linear probe: measure in seconds what a set of features is worth."""

import numpy as np
import torch
from torch import Tensor, nn

NEIGHBOURS = 20
TEMPERATURE = 0.07  # of the neighbours' weights, as usual for this probe (arXiv 1805.01978)
RIDGE = 0.1  # penalty of the linear probe over the number of images, for standardised features


def knn_scores(
    features: Tensor, labels: np.ndarray, queries: Tensor, same_patient: Tensor, neighbours: int = NEIGHBOURS
) -> np.ndarray:
    """Share of positives among the nearest images by cosine, weighted with exp(cosine / 0.07).

    Subtract the mean of the known images first, since features after a ReLU all point in one direction.

    Args:
        features: of the images whose labels are known, [N, C].
        labels: [N, L], 1, 0 or NaN; an image is no neighbour for a label that is unknown of it.
        queries: features of the images to score, [M, C].
        same_patient: [M, N]; images of a query's own patient are no neighbours.
        neighbours: how many.

    Returns:
        [M, L], from 0 to 1; 0 if a query has no neighbour.
    """
    mean = features.double().mean(0)
    units, asked = (nn.functional.normalize(x.double() - mean, dim=1) for x in (features, queries))
    cosine = (asked @ units.T).masked_fill(same_patient, -torch.inf)  # [M, N]
    scores = np.zeros((len(queries), labels.shape[1]))
    for column, values in enumerate(torch.from_numpy(labels).double().T):
        known = ~values.isnan()
        near = cosine[:, known].topk(min(neighbours, int(known.sum())), dim=1)
        weights = ((near.values - 1) / TEMPERATURE).exp()  # [M, k], 0 for the query's own patient
        share = (weights * values[known][near.indices]).sum(1) / weights.sum(1).clamp(min=1e-300)
        scores[:, column] = share.numpy()
    return scores


def linear_scores(features: Tensor, labels: np.ndarray, queries: Tensor) -> np.ndarray:
    """Scores of a linear layer, fitted for each label on the images where the label is known.

    It is a ridge regression on standardised features in closed form. It has no iterations that may not converge, and
    is a few times faster than a logistic regression, from whose AUROC it differs by about 0.01.

    Args:
        features: [N, C].
        labels: [N, L], 1, 0 or NaN.
        queries: [M, C].

    Returns:
        [M, L].
    """
    mean, deviation = features.double().mean(0), features.double().std(0, correction=0)
    deviation = deviation.clamp(min=1e-6 * float(deviation.max()) + 1e-300)  # dead features
    x, asked = ((values.double() - mean) / deviation for values in (features, queries))
    identity = torch.eye(x.shape[1], dtype=torch.float64)
    scores = np.zeros((len(queries), labels.shape[1]))
    table = torch.from_numpy(labels).double()
    masks, mask_of = (~table.isnan()).unique(dim=1, return_inverse=True)
    for number, known in enumerate(masks.T):
        columns = mask_of == number  # labels that the same images know are solved together
        some, target = x[known] - x[known].mean(0), table[known][:, columns]
        weights = torch.linalg.solve(some.T @ some + RIDGE * len(some) * identity, some.T @ (target - target.mean(0)))
        scores[:, columns.numpy()] = (asked @ weights).numpy()
    return scores
