"""The experts that one event makes active, as the kernels read them: one column an expert."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int32

EXPERT, SLOT, LANDED, WRITE, PARTNER, SKIP, ACTIVE = range(7)
"""Rows of the table.

EXPERT   number of the expert in its layer; 0 in an unused column
SLOT     slot that holds it or will hold it; 0 where there is none
LANDED   leading rows of the expert that lie in the slot: all for a hit, 0 for a miss, between for
         one whose prefetch is late; the others are read from host memory
WRITE    1 if what is read from host memory is written through into the slot, 0 if it streams past
PARTNER  column of the demanded expert that is about to lose this very slot; it must be read before
         this column writes; -1 where there is none
SKIP     1 if this column is some other one's partner, which computes it first
ACTIVE   1 for a demanded expert, 0 for an unused column
"""

NUM_ROWS = 8


class Active(NamedTuple):
    """What the routed experts of one layer have to do, columns in the order of expert numbers.

    Attributes:
      table: Rows as named above.
      weights: What each expert's answer counts for each request; 0 where it was not chosen.
      is_live: 1 while the prefetch that was under way at this event goes on.
    """

    table: Int32[Array, "rows columns"]
    weights: Float[Array, "columns batch"]
    is_live: Int32[Array, " 1"]
