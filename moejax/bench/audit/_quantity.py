"""One audited claim: what we set beside it, and the rule that judges it."""

from typing import NamedTuple

from ._view import Found, Value

TOLERANCE_RATIO = 0.1
"""Of the claim: a claim that lies so close to our interval counts as reproduced."""

REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced"
CONTRADICTORY = "contradicts itself"
CONDITIONAL = "depends on assumption"


class Assumption(NamedTuple):
    """What the study takes for granted, and where we look when we do not.

    Attributes:
      text: The assumption, as a clause.
      lifted: Name of the view without it.
    """

    text: str
    lifted: str


class Quantity(NamedTuple):
    """What belongs beside one claim.

    Attributes:
      unit: Unit of the claim and of ours.
      value: Ours; None where nothing that moejax computes bears on the claim.
      reason: One line, with places for `claimed`, `ours`, `otherwise` and `times` (the larger of
        the first two over the smaller).
      assumption: Of the study's, what the result may hang on.
      conflicts: Ids of `known_conflicts` that concern the claim.
      relation: `equal`, `over` or `under`: how ours must stand to what is claimed.
      expected: The number that a claim in words comes to; None takes the claim itself.
      has_real: Whether the quantity means something on the run's own model.
    """

    unit: str
    value: Value | None
    reason: str
    assumption: Assumption | None = None
    conflicts: tuple[str, ...] = ()
    relation: str = "equal"
    expected: float | None = None
    has_real: bool = True


def agrees(quantity: Quantity, claimed: float | str, found: Found | None) -> bool:
    """Whether what was found bears the claim out.

    Numbers: the claim lies in our interval widened by `TOLERANCE_RATIO` of the claim on both
    sides; `over` and `under` leave the other side open, and are strict where nothing widens them.
    Names: they are the same.
    """
    if found is None:
        return False
    if quantity.expected is not None:
        claimed = quantity.expected
    if isinstance(claimed, str) or isinstance(found.value, str):
        return claimed == found.value
    slack = TOLERANCE_RATIO * abs(claimed)
    low, high = found.interval or (found.value, found.value)
    if quantity.relation == "over":
        return high + slack > claimed
    if quantity.relation == "under":
        return low - slack < claimed
    return low - slack <= claimed <= high + slack


def judge(
    quantity: Quantity,
    claimed: float | str,
    ours: Found | None,
    otherwise: Found | None,
    *,
    is_contradicted: bool,
) -> str:
    """The verdict on a claim, by rule.

    A claim that others of the study exclude contradicts itself, whatever we find. One that agrees
    with ours is reproduced, unless it has an assumption without which ours no longer agrees.
    """
    if is_contradicted:
        return CONTRADICTORY
    if not agrees(quantity, claimed, ours):
        return NOT_REPRODUCED
    if quantity.assumption is None or otherwise is None:
        return REPRODUCED
    return REPRODUCED if agrees(quantity, claimed, otherwise) else CONDITIONAL
