"""The words of the report and the strategies, as the README has them."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

GLOSSARY: Mapping[str, str] = MappingProxyType(
    {
        "expert": "one of many feed-forward networks of a layer, of which the router picks a few "
        "for a token",
        "slot": "room for one expert on the device",
        "demand": "the set of experts that one layer needs in one step",
        "hit, late, miss": "demanded and resident; demanded while its prefetch is on the way; "
        "demanded and absent",
        "stall": "waiting for the link that no compute hides",
        "step": "one decoded token for every request of a batch",
        "tier": "a memory with a share of the experts: device slots, pinned host, pageable host, "
        "then the store",
        "profile": "of a machine: its constants; of routing: a trace that strategies may learn "
        "from",
        "TTFT, TPOT": "time to the first token; time per token after it",
        "lookahead": "what the next layers' gates would choose if they saw this layer's input",
        "trace": "which experts each token of some requests was routed to, layer by layer",
        "workload": "a recipe for synthetic traces with the statistics of a real model",
    }
)

_WEB = ("the past", "what this cache of the web keeps, with queues for each layer", "nothing")

STRATEGIES: Mapping[str, tuple[str, str, str]] = MappingProxyType(
    {
        "on_demand": ("nothing", "nothing", "nothing"),
        "oracle": (
            "the future",
            "what is needed soonest (Belady)",
            "what is needed next, as far as the link has time",
        ),
        "multi_look": (
            "a profile, the past",
            "recency, corrected by predicted use",
            "up to three layers ahead, by layer-to-layer patterns",
        ),
        "top_k": (
            "a profile",
            "its most frequent experts, pinned: at most half of a layer's",
            "nothing",
        ),
        "intelligent": (
            "a profile, the past, learned online",
            "predicted reuse: recency, frequency, popularity, succession",
            "the next layer, by value",
        ),
        "lru": ("the past", "what was used last", "nothing"),
        "lfu": ("the past", "what was used most often", "nothing"),
        "fifo": ("the past", "what was loaded last", "nothing"),
        "sieve": _WEB,
        "s3fifo": _WEB,
        "arc": _WEB,
        "least_stale": (
            "the past",
            "what this forward pass used, then the last loaded (our reading of SpecMD)",
            "nothing",
        ),
        "gate_look": ("the next layers' gates", "recency", "what those gates name"),
    }
)
"""What each may look at, what it keeps, and what it prefetches."""


def strategies_table(names: Iterable[str]) -> str:
    """What the strategies of a run do, wrapped ones and strangers left out."""
    known = {name: STRATEGIES[name] for name in names if name in STRATEGIES}
    rows = [f"| `{name}` | {' | '.join(words)} |" for name, words in known.items()]
    if not rows:
        return ""
    header = ("strategy", "may look at", "keeps", "prefetches")
    rules = " | ".join("---" for _ in header)
    return "\n".join([f"| {' | '.join(header)} |", f"| {rules} |", *rows])


def glossary() -> str:
    """The section that says what the words mean."""
    rows = [f"| {word} | {meaning} |" for word, meaning in GLOSSARY.items()]
    return "\n".join(["## Glossary", "", "| word | meaning |", "| --- | --- |", *rows])
