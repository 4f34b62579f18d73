"""The next gate, asked early."""

from moejax.strategies._base import Strategy
from moejax.strategies._lru import lru
from moejax.strategies._predict import calibrated, gate
from moejax.strategies._wrap import with_prefetch


def gate_look() -> Strategy:
    """Recency, with prefetch of what the next layers' gates say about this hidden state.

    Needs a trace that carries `lookahead`, or the engine's own gates.

    Reference:
      Eliseev, Mazur, "Fast inference of mixture-of-experts language models with offloading",
      arXiv:2312.17238, section 3.2.
    """
    return with_prefetch(lru(), calibrated(gate()))
