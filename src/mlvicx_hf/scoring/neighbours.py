"""Exact nearest neighbours by cosine, and how often they have a query's finding."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PRECISION_TOP = 5  # neighbours of a query whose precision is reported
BLOCK = 2**24  # cosines computed at a time, 64 MiB


def nearest_rows(
    units: Tensor,
    queries: Tensor,
    top: int,
    groups: tuple[Tensor, Tensor] | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the rows nearest to each query by cosine, a block of rows at a time: `units` may be a memory map.

    Args:
        units: rows of length 1, float32 [N, C].
        queries: of any length, [Q, C].
        top: neighbours wanted of each query; K is this, or N if there are fewer rows.
        groups: whole numbers of the rows, [N], and of the queries, [Q], such as their patients. A row is no neighbour
            of a query of the same group.
        keep: bool [N]; a row is a neighbour only where it is true.

    Returns:
        Cosines [Q, K], greatest first, and rows [Q, K]. The cosine is -inf behind the last neighbour of a query. Rows
        that hold a NaN come first, with the cosine NaN.
    """
    asked = nn.functional.normalize(queries.float(), dim=1)
    top = min(top, len(units))
    best, rows = torch.empty(len(asked), 0), torch.empty(len(asked), 0, dtype=torch.long)
    step = max(1, BLOCK // max(1, len(asked)))
    for start in range(0, len(units), step):
        block = slice(start, start + step)
        cosines = asked @ units[block].T  # [Q, rows of the block]
        if groups is not None:
            cosines.masked_fill_(groups[1][:, None] == groups[0][None, block], -torch.inf)
        if keep is not None:
            cosines.masked_fill_(~keep[None, block], -torch.inf)
        near = cosines.topk(min(top, cosines.shape[1]), dim=1)
        best = torch.cat([best, near.values], dim=1)
        rows = torch.cat([rows, near.indices + start], dim=1)
        best, order = best.sort(dim=1, descending=True, stable=True)
        best, rows = best[:, :top], rows.gather(1, order)[:, :top]
    return best, rows


def precision_of_neighbours(
    units: Tensor,
    labels: np.ndarray,
    queries: Tensor,
    query_labels: np.ndarray,
    groups: tuple[Tensor, Tensor],
    top: int = PRECISION_TOP,
) -> list[dict[str, float | int | None]]:
    """For each label, the share of positives among the nearest rows of the queries that have it: precision@top.

    Args:
        units: rows of length 1, [N, C].
        labels: of the rows, [N, L], 1, 0 or NaN; a row is no neighbour for a label that is unknown of it.
        queries: [Q, C].
        query_labels: [Q, L].
        groups: see `nearest_rows`.
        top: neighbours of each query.

    Returns:
        For each label `queries`, how many have it; `precision`; and `chance`, the share of positives among all rows
        where the label is known. None where there is nothing to count.
    """
    scores: list[dict[str, float | int | None]] = []
    for values, wanted in zip(labels.T.astype(float), query_labels.T, strict=True):
        asked, known = torch.from_numpy(wanted == 1), ~np.isnan(values)
        own = (groups[0], groups[1][asked])
        cosines, rows = nearest_rows(units, queries[asked], top, own, torch.from_numpy(known))
        found = values[rows[cosines > -torch.inf].numpy()]
        scores.append(
            {
                "queries": int(asked.sum()),
                "precision": float(found.mean()) if len(found) else None,
                "chance": float(values[known].mean()) if known.any() else None,
            }
        )
    return scores


def mean_precision(scores: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Mean `precision` and `chance` of `precision_of_neighbours` over the labels with a precision; None without one."""
    scored = [score for score in scores if score["precision"] is not None]
    return {
        name: float(np.mean([score[name] for score in scored])) if scored else None for name in ("precision", "chance")
    }
