"""Paired comparisons over worlds: t interval, adjusted p-values, bootstrap over worlds × prompts, and verdicts."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

LEVEL = 0.05
_RESAMPLES = 4000


@dataclass(frozen=True)
class Paired:
    """The mean of paired differences, with Student's t interval and test of mean 0.

    Attributes:
        sd: sample standard deviation; nan for a single difference, and so are the fields below.
        low, high: the 95% interval of the mean.
        p: two-sided. Without any deviation it is 0, or 1 if the mean is 0.
    """

    n: int
    mean: float
    sd: float
    low: float
    high: float
    p: float


def paired(differences: Sequence[float]) -> Paired:
    """The comparison of two arms from their differences, one for each world; at least one."""
    values = np.asarray(differences, float)
    n, mean = len(values), float(values.mean())
    if n == 1:
        return Paired(n, mean, math.nan, math.nan, math.nan, math.nan)
    sd = float(values.std(ddof=1))
    error = sd / math.sqrt(n)
    half = float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    return Paired(n, mean, sd, mean - half, mean + half, p)


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted by Holm's step-down method (1979), which bounds the chance of any false rejection among them."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted


def bootstrap(
    differences: Sequence[np.ndarray], seed: int = 0, resamples: int = _RESAMPLES
) -> tuple[float, float]:
    """The 95% percentile interval of a mean difference when worlds and prompts are both redrawn.

    Worlds and the prompts of each set are drawn independently, with replacement, because every world answers the same
    prompts (Owen, 2007: the pigeonhole bootstrap). With few worlds the interval is too narrow by about sqrt(1 - 1/n).

    Args:
        differences: for each set, differences_WxP of worlds × prompts.

    Returns:
        The interval of the mean over sets of the mean over worlds and prompts.
    """
    random = np.random.default_rng(seed)
    worlds = len(differences[0])
    counts_BxW = random.multinomial(worlds, np.full(worlds, 1 / worlds), size=resamples) / worlds
    means_B = np.zeros(resamples)
    for differences_WxP in differences:
        prompts = differences_WxP.shape[1]
        of_worlds_BxP = counts_BxW @ differences_WxP
        counts_BxP = random.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples) / prompts
        means_B += (of_worlds_BxP * counts_BxP).sum(axis=1) / len(differences)
    low, high = np.quantile(means_B, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


@functools.cache
def detectable(n: int, power: float = 0.8) -> float:
    """The smallest true mean that a paired t test of `n` differences finds with `power`, in their standard deviations."""
    if n < 2:
        return math.inf
    critical = float(stats.t.ppf(1 - LEVEL / 2, n - 1))

    def excess(effect: float) -> float:
        found = stats.nct.sf(critical, n - 1, effect * math.sqrt(n))
        return float(found) - power  # rejections in the wrong direction do not count

    return float(optimize.brentq(excess, 1e-3, 30.0))  # pyright: ignore[reportArgumentType]


def verdict(found: Paired, p: float, sign: int, effect: float | None) -> str:
    """What a finished comparison says about a statement.

    - "holds": p < 0.05, and the difference has the statement's sign.
    - "reversed": p < 0.05, and it has the other sign.
    - "smaller than the paper's effect": neither, and the t interval ends before the paper's effect.
    - "unresolved": none of these.

    Args:
        p: adjusted if the comparison is one of several primary ones.
        sign: of the difference according to the statement, 1 or -1.
        effect: the paper's difference, if it gives one.
    """
    if p < LEVEL:
        return "holds" if found.mean * sign > 0 else "reversed"
    farthest = max(found.low * sign, found.high * sign)
    if effect is not None and farthest < effect * sign:
        return "smaller than the paper's effect"
    return "unresolved"
