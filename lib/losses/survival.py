"""Survival losses: Cox's partial likelihood and hazards in discrete time.

outcome: [B, 2] of days until the event, or until the last visit, and whether it came (1 or 0). Only the order of the
days counts for Cox, so that it needs a batch: a case is compared with all that were still at risk when it failed.

A batch without any event says nothing about order. Its partial likelihood is an empty product, 1, whose logarithm is
0, and its gradient is 0: the losses return that, with the graph kept, since a small batch can lack events by chance
and the next one makes up for it. A whole data set without events is a mistake, which a batch cannot tell: callers that
hold one say `strict=True`, and `lib.survival` refuses such a table always.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lib.losses import full

TIES = ("breslow", "efron")
FIVE_YEARS = 1826.0  # days


def cox(risk: Tensor, outcome: Tensor, ties: str = "breslow", strict: bool = False) -> Tensor:
    """Negative log partial likelihood of log hazard ratios, averaged over events (Cox 1972).

    risk: [B] or [B, 1], higher = earlier; ties: how events at the same time share their risk set, "breslow" (1974: each
    sees all of it) or "efron" (1977: the l-th of d sees l/d of the tied events gone). Raises ValueError for another
    shape, for days that are negative or unknown, and with `strict` where no event is among the cases.
    """
    if ties not in TIES:
        raise ValueError(f"There is no handling of ties {ties!r}: use one of {', '.join(TIES)}.")
    if risk.ndim == 2 and risk.shape[1] == 1:
        risk = risk[:, 0]
    if risk.ndim != 1:
        raise ValueError(f"Risks have the shape {tuple(risk.shape)}: give Cox's loss one for each case, [B] or [B, 1].")
    days, event = _read(outcome, len(risk), strict)
    risk = _full(risk)
    if not event.any():
        return risk.sum() * 0
    order = days.argsort(descending=True, stable=True)
    risk, event = risk[order], event[order]
    # Whoever fails is compared with all who were seen that long: those before it in the order, and its ties.
    _, group, size = days[order].unique_consecutive(return_inverse=True, return_counts=True)
    at_risk = risk.logcumsumexp(0)[size.cumsum(0)[group] - 1][event]
    if ties == "efron":
        at_risk = at_risk + torch.log1p(-_gone(risk[event], group[event], at_risk))
    return (at_risk - risk[event]).mean()


def _gone(risk: Tensor, group: Tensor, at_risk: Tensor) -> Tensor:
    """Efron's l/d Σ e^tied / Σ e^at risk of each event, l = 0 … d - 1 among the d events of its group."""
    number = group.bincount()
    # Only the group's sum counts, so that any order within it will do.
    before = torch.arange(len(group), device=group.device) - (number.cumsum(0) - number)[group]
    top = risk.new_full(number.shape, -torch.inf).scatter_reduce(0, group, risk.detach(), "amax")[group]
    tied = top + risk.new_zeros(number.shape).index_add(0, group, (risk - top).exp())[group].log()
    return (tied - at_risk).exp() * before / number[group]


def cox_efron(risk: Tensor, outcome: Tensor) -> Tensor:
    """Cox's loss with Efron's handling of ties."""
    return cox(risk, outcome, ties="efron")


def discrete_time(logits: Tensor, outcome: Tensor, edges: Tensor, strict: bool = False) -> Tensor:
    """Negative log likelihood of hazards in K intervals, averaged over cases (Gensheimer & Narasimhan 2019, Eq. 3).

    logits: [B, K], of the hazard of each interval; edges: [K + 1] rising days from 0. An event falls into the interval
    [edge, next edge), beyond the last edge all intervals were survived; a censored case has survived an interval of
    which it saw half. Raises ValueError as `cox` does, and for edges that do not rise from 0.
    """
    logits, edges = full(logits), torch.as_tensor(edges, dtype=torch.float64, device=logits.device)
    if logits.ndim != 2 or edges.shape != (logits.shape[1] + 1,):
        raise ValueError(
            f"Logits {tuple(logits.shape)} and edges {tuple(edges.shape)} do not fit: give [B, K] and [K + 1]."
        )
    if edges[0] != 0 or not (edges.diff() > 0).all():
        raise ValueError(f"Edges {edges.tolist()} must rise from 0: give the days between which hazards are constant.")
    days, event = _read(outcome, len(logits), strict)
    days, event = days.double()[:, None], event[:, None]
    start, stop = edges[:-1], edges[1:]
    survived = torch.where(event, days >= stop, days >= (start + stop) / 2)
    failed = event & (days >= start) & (days < stop)
    # -log(1 - hazard) where survived, -log hazard where failed, nothing where not seen.
    return (F.softplus(logits) * survived + F.softplus(-logits) * failed).sum(1).mean()


def discrete(logits: Tensor, outcome: Tensor, end: float = FIVE_YEARS) -> Tensor:
    """`discrete_time` on equal intervals from 0 to `end` days, as many as there are logits.

    What comes after `end` counts as survived, so it should be where the events of the training cases thin out:
    "discrete@end=900".
    """
    return discrete_time(logits, outcome, torch.linspace(0, end, logits.shape[-1] + 1, dtype=torch.float64))


def discrete_survival(logits: Tensor) -> Tensor:
    """Chance [B, K] to be event-free at the end of each interval, for hazards [B, K] in discrete time."""
    return F.logsigmoid(-logits).cumsum(1).exp()


def discrete_risk(logits: Tensor) -> Tensor:
    """One risk [B] for hazards [B, K] in discrete time: minus the number of intervals survived on average."""
    return -discrete_survival(logits).sum(1)


def _full(x: Tensor) -> Tensor:
    # Not lib.losses.full: log hazard ratios may well all lie between 0 and 1, where it would warn of probabilities.
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _read(outcome: Tensor, cases: int, strict: bool) -> tuple[Tensor, Tensor]:
    """Days [B] and events [B] as bool."""
    if outcome.shape != (cases, 2):
        raise ValueError(
            f"Outcomes {tuple(outcome.shape)} do not fit {cases} cases: give [B, 2] of days and event (1 or 0)."
        )
    days, event = outcome.unbind(1)
    wrong = ~((days >= 0) & days.isfinite() & ((event == 0) | (event == 1)))
    if wrong.any():
        found = ", ".join(f"{number:g}" for number in outcome[wrong][0].tolist())
        raise ValueError(
            f"{int(wrong.sum())} of {cases} outcomes are unusable, first ({found}): "
            "times are days of 0 or more and events 1 or 0, so leave out cases without them."
        )
    if strict and not event.any():
        raise ValueError(f"All {cases} cases are censored, which says nothing about risk: use cases with events.")
    return days, event.bool()
