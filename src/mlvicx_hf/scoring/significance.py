"""Is one classifier better than another? Tests over seeds and of a single pair."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from mlvicx_hf.common.errors import UserError


def paired_tests(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Paired t-test and Wilcoxon signed-rank test of a score over seeds (section V-A of the paper), both two-sided.

    Args:
        ours: scores of one model, one for each seed.
        theirs: scores of another model for the same seeds in the same order.

    Returns:
        `seeds`, `difference` (mean), `t_p`, `wilcoxon_p`; p is 1 if no seed differs, and `t_p` NaN if all differ by the
        same, which is chance in scores of few images and no proof. With few seeds the Wilcoxon test cannot be
        significant, whatever the scores are: 5 seeds give 0.0625 at least.

    Raises:
        UserError: unequal numbers of seeds, fewer than two, or a score that is not finite.
    """
    first, second = np.asarray(ours, float), np.asarray(theirs, float)
    if first.shape != second.shape or first.ndim != 1 or len(first) < 2:
        raise UserError(f"{first.size} and {second.size} scores found; expected equally many, two or more, one a seed")
    if not np.isfinite([first, second]).all():
        raise UserError("a score that is not finite found; expected finished runs in which every one was scored")
    differences = first - second
    found = {"seeds": len(first), "difference": float(differences.mean())}
    if not differences.any():
        return found | {"t_p": 1.0, "wilcoxon_p": 1.0}
    same = np.isclose(np.ptp(differences), 0, atol=1e-12)  # the statistic would be infinite
    t_p = math.nan if same else float(stats.ttest_rel(first, second).pvalue)
    return found | {"t_p": t_p, "wilcoxon_p": float(stats.wilcoxon(differences).pvalue)}


def delong_test(labels: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Compare two AUROCs on the same images (DeLong, DeLong and Clarke-Pearson, Biometrics 44, 1988), two-sided.

    The test assumes that images are independent. If patients have several, use `compare_runs`, which draws patients.

    Args:
        labels: [N], 1, 0 or NaN; unknown ones are left out.
        ours: scores of one model, [N].
        theirs: of the other, [N].

    Returns:
        `auroc`, `other_auroc`, `difference`, its standard error `se`, and `p`: 1 if the AUROCs are equal, NaN if they
        differ without any variance, as with few images that one model ranks without a mistake and the other all alike.

    Raises:
        UserError: fewer than two images of either label, or a score that is not finite.
    """
    known = ~np.isnan(labels)
    scores = np.stack([ours, theirs])[:, known].astype(float)  # [2, N]
    positive = labels[known] == 1
    m, n = int(positive.sum()), int((~positive).sum())
    if min(m, n) < 2:
        raise UserError(f"{m} positive and {n} negative labels found; expected two of each at least")
    if not np.isfinite(scores).all():
        raise UserError("a score that is not finite found; expected finite ones")
    # Share of the other kind that each image beats, ties half, by ranks (Sun and Xu, IEEE SPL 21, 2014).
    ranks = stats.rankdata(scores, axis=1)
    wins = (ranks[:, positive] - stats.rankdata(scores[:, positive], axis=1)) / n  # [2, m]
    losses = 1 - (ranks[:, ~positive] - stats.rankdata(scores[:, ~positive], axis=1)) / m  # [2, n]
    first, second = wins.mean(1)
    variance = sum((part[0] - part[1]).var(ddof=1) / part.shape[1] for part in (wins, losses))
    difference = float(first - second)
    p = 1.0
    if difference:
        p = (
            float(2 * stats.norm.sf(abs(difference) / np.sqrt(variance)))
            if variance > 1e-18 * difference**2
            else math.nan
        )
    return {
        "auroc": float(first),
        "other_auroc": float(second),
        "difference": difference,
        "se": float(np.sqrt(variance)),
        "p": p,
    }
