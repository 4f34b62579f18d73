"""The words of the report, as the README has them."""

from collections.abc import Mapping
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


def glossary() -> str:
    """The section that says what the words mean."""
    rows = [f"| {word} | {meaning} |" for word, meaning in GLOSSARY.items()]
    return "\n".join(["## Glossary", "", "| word | meaning |", "| --- | --- |", *rows])
