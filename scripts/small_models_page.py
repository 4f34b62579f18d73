"""The text of the report on the small models, made from its results.json."""

from typing import Any

from small_models_routing import RECORDINGS

from moejax.units import format_ratio, format_seconds

MEASURES = {
    "reuse_ratio": "reuse by the next token",
    "reuse_chance_ratio": "at random",
    "gini": "Gini of popularity",
    "max_mean_load_ratio": "busiest over mean expert",
    "next_layer_recall_ratio": "next-layer recall",
    "in_order_next_layer_recall_ratio": "from other domains",
}
MADE_BY = "python scripts/report_small_models.py"


def page(results: dict[str, Any]) -> str:
    """The report as Markdown."""
    return "\n".join(
        [
            "# tiny-moe and small-moe: training and routing",
            "",
            *_answer(results),
            "",
            f"Made by `{MADE_BY}` from the files beside this page; every figure is in "
            "`results.json`. Rows of other people's recordings are kept from the last time that "
            "`--recorded FOLDER` was given too.",
            "",
            "## Training",
            "",
            *_training(results),
            "",
            "## Held-out loss by domain",
            "",
            "Documents that were not trained on, at most 512 tokens of context, no expert ever "
            "full, weights and sums in bfloat16. Two models compare by bits a byte: their tokens "
            "differ.",
            "",
            *_heldout_table(results["recording"]),
            "",
            "## Routing beside recorded models",
            "",
            *_routing(results),
            "",
            "## Caches",
            "",
            *_hits(results),
            "",
            "## What foretells an expert",
            "",
            *_ahead(results),
            "",
            "## Domains",
            "",
            *_domains(results),
            "",
            "## The corpus and its credits",
            "",
            *_corpus(results["corpus"]),
            "",
            "## Samples",
            "",
            "The first text of each domain, sampled at temperature 0.8. The prompt is held out; "
            "`[...]` is where the model goes on.",
            "",
            *_samples(results["samples"]),
        ]
    )


def _answer(results: dict[str, Any]) -> list[str]:
    small = results["routing"]["small-moe"]
    published = results["published"]
    domains = results["recording"]["small-moe"]["domains"]["pinned_0.5"]
    ahead = results["recording"]["small-moe"]["lookahead_recall"]["1"]
    lru = small["lru_hit_ratio_warm"]
    known = published["hit_ratio_warm"]["lru"]
    return [
        "small-moe has Qwen1.5-MoE's routing shape (24 layers, 60 experts, top-4) and routing that "
        "was learned, **but it is not Qwen's**. Use its trace to try strategies on texts that have "
        "topics; do not read Qwen's hit ratios from it.",
        "",
        "What it has in common with recorded models:",
        "",
        f"- Experts are used evenly: Gini {small['gini']:.2f}, Qwen's is "
        f"{_span(published['gini'])}.",
        "- Routing depends on what the text is about. Pinning half of the experts by a profile of "
        f"the same domain hits {format_ratio(domains['same_domain_hit_ratio'])}, by one of "
        f"another domain {format_ratio(domains['other_domain_hit_ratio'])}: no more than chance. "
        "DeepSeek-V2-Lite's routing on four tasks behaves alike, gpt-oss-20b's much less.",
        "",
        "What it has not:",
        "",
        f"- **Caches hit more often than Qwen's.** LRU at 8 of 60 slots hits "
        f"{format_ratio(lru['8'])}, at 30 {format_ratio(lru['30'])}; published for Qwen are "
        f"{format_ratio(known['8'])} and {format_ratio(known['30'])}. The next token uses "
        f"{format_ratio(small['reuse_ratio'])} of a token's experts again, Qwen's "
        f"{' to '.join(format_ratio(bound) for bound in published['reuse_ratio'])}; at random it "
        f"were {format_ratio(small['reuse_chance_ratio'])}.",
        "- **A layer's experts tell the next layer's less well**: recall "
        f"{small['next_layer_recall_ratio']:.2f}, and "
        f"{small['in_order_next_layer_recall_ratio']:.2f} when pairs were counted on other "
        f"domains; Qwen's is {_span(published['next_layer_recall_ratio'])}. Strategies that "
        "predict from pairs of experts have less to go by here.",
        f"- The next layer's gate, asked one layer early, names {format_ratio(ahead['best_4'])} of "
        "its experts. We have no such number for Qwen.",
        "- small-moe over-fits (below), and both models know little: they were trained for "
        "minutes.",
    ]


def _span(bounds: list[float]) -> str:
    return f"{bounds[0]:.2f} to {bounds[1]:.2f}"


def _training(results: dict[str, Any]) -> list[str]:
    training, corpus = results["training"], results["corpus"]
    log = training["small-moe"]
    best = min(log["heldout"], key=lambda line: line["loss"]["all"])
    last = log["heldout"][-1]
    epochs = log["curve"]["num_tokens"][-1] / corpus["num_train_tokens"]
    least, end = (line["bits_per_byte"]["all"] for line in (best, last))
    return [
        "By `scripts/train_model.py`, from scratch, on the corpus of `scripts/build_corpus.py`.",
        "",
        "![Loss over the steps of both models](figures/loss.png)",
        "",
        f"**small-moe over-fits.** It read the {corpus['num_train_tokens'] / 1e6:.1f} M tokens of "
        f"the corpus {epochs:.0f} times. Its held-out loss was least at step {best['step']:,} of "
        f"those where it was measured ({best['loss']['all']:.2f} nats a token, {least:.3f} bits a "
        f"byte) and rose to {last['loss']['all']:.2f} ({end:.3f} bits a byte) at the end, while "
        f"the training loss fell to {log['curve']['loss'][-1]:.2f}, a step down with each new pass "
        "over the corpus. It needed more text, not more steps. The trace is of the last step; how "
        "the model routed when its held-out loss was least was not recorded.",
        "",
        "tiny-moe read its corpus, the same in bytes, "
        f"{training['tiny-moe']['curve']['num_tokens'][-1] / _num_bytes(corpus):.1f} times. Its "
        "held-out loss was measured at the end only, and is "
        f"{training['tiny-moe']['heldout'][-1]['loss']['all']:.3f} nats a byte beside a training "
        f"loss of {training['tiny-moe']['curve']['loss'][-1]:.3f}.",
        "",
        *_training_table(training),
    ]


def _num_bytes(corpus: dict[str, Any]) -> int:
    return sum(domain["num_bytes"] for domain in corpus["domains"].values())


def _training_table(training: dict[str, Any]) -> list[str]:
    rows = {
        "device": lambda log: log["runs"][0]["environment"]["device"],
        "runs": lambda log: str(len(log["runs"])),
        "weights": lambda log: f"{log['runs'][0]['num_weights'] / 1e6:.1f} M",
        "windows of 512 tokens a step": lambda log: str(log["runs"][0]["recipe"]["batch_size"]),
        "steps": lambda log: f"{log['curve']['step'][-1]:,}",
        "tokens read": lambda log: f"{log['curve']['num_tokens'][-1] / 1e6:,.0f} M",
        "tokens a second, median": lambda log: f"{log['tokens_per_s']:,.0f}",
        "wall-clock time, all included": lambda log: format_seconds(log["elapsed_s"]),
        "training loss at the end, nats a token": lambda log: f"{log['curve']['loss'][-1]:.3f}",
        "load-balancing loss at the end (1 is even)": lambda log: (
            f"{log['curve']['balance_ratio'][-1]:.3f}"
        ),
        "dropped pairs at the end": lambda log: format_ratio(log["curve"]["dropped_ratio"][-1]),
        "steps skipped for a gradient that was not finite": lambda log: str(log["num_skipped"]),
    }
    return _table(
        ["", *training],
        [[name, *(say(log) for log in training.values())] for name, say in rows.items()],
    )


def _heldout_table(recording: dict[str, Any]) -> list[str]:
    tiny, small = (recording[name]["heldout"] for name in ("tiny-moe", "small-moe"))
    head = ["domain", "tiny-moe, bits a byte", "small-moe, bits a byte", "small-moe, nats a token"]
    rows = [
        [name, *(f"{value:.3f}" for value in values)]
        for name, *values in (
            (one, tiny["bits_per_byte"][one], small["bits_per_byte"][one], small["loss"][one])
            for one in small["loss"]
        )
    ]
    return _table(head, rows)


def _routing(results: dict[str, Any]) -> list[str]:
    rows = []
    for name, row in results["routing"].items():
        trace = results["recording"][name]["trace"]
        kind = f"{sum(trace['num_requests'].values())} texts, generated"
        rows.append([f"**{name}**", kind, *_routing_cells(row)])
    for name, row in results["recorded_models"].items():
        label, kind, _ = RECORDINGS.get(name, (name, "", ""))
        rows.append([label, kind, *_routing_cells(row)])
    published = {"shape": "24 x 60, top-4", "reuse_chance_ratio": 4 / 60, **results["published"]}
    rows.append(["Qwen1.5-MoE-A2.7B", "published", *_routing_cells(published)])
    sources = sorted({source for _, _, source in RECORDINGS.values()})
    return [
        "Means over layers. *Next-layer recall* is the share of a layer's experts among the top-k "
        "that pairs of experts, counted on every other text, predict from the layer below in the "
        "rest; at random it equals reuse at random. *From other domains*: counted on the first "
        "half of the domains, as `moejax trace info` does with our traces.",
        "",
        *_table(["recording", "texts", "tokens", "layers x experts", *MEASURES.values()], rows),
        "",
        "Rows of one short text are given for completeness: on 150 tokens of one topic popularity "
        "looks uneven, and pairs are counted on too few. Recordings are other people's, described "
        "by the code that describes ours, and are no part of the project: "
        f"{'; '.join(sources)}. Qwen1.5-MoE: {results['published']['source']}.",
    ]


def _routing_cells(row: dict[str, Any]) -> list[str]:
    num_tokens = f"{row['num_tokens']:,}" if "num_tokens" in row else ""
    # One text has one domain.
    hidden = {"in_order_next_layer_recall_ratio"} if row.get("num_requests") == 1 else set()
    cells = ("" if measure in hidden else _cell(row.get(measure)) for measure in MEASURES)
    return [num_tokens, row["shape"], *cells]


def _cell(value: float | list[float] | None) -> str:
    if value is None:
        return ""
    return _span(value) if isinstance(value, list) else f"{value:.3f}"


def _hits(results: dict[str, Any]) -> list[str]:
    measured = {f"**{name}**": row for name, row in results["routing"].items()}
    measured |= {
        RECORDINGS.get(name, (name, "", ""))[0]: row
        for name, row in results["recorded_models"].items()
    }
    rows = [
        [
            name,
            row["shape"].partition(" x ")[2],
            *(format_ratio(value[0]) for value in _hit_columns(row)),
            *(format_ratio(value[1]) for value in _hit_columns(row)),
        ]
        for name, row in measured.items()
    ]
    rows += [
        [
            f"{name}, published",
            shape,
            format_ratio(2 * _topk(shape) / int(shape.partition(",")[0])),
            format_ratio(lru),
            format_ratio(oracle),
            *(_published_half(results["published"]) if name.startswith("Qwen1.5") else [""] * 3),
        ]
        for name, (shape, lru, oracle) in results["published"]["twice_topk"].items()
    ]
    return [
        "![Hit ratio against slots per layer](figures/hits.png)",
        "",
        "Caches of a layer each, demand only, one text from an empty cache, first touches "
        "forgiven while a slot is free, as in the published curves; `moejax simulate` counts them "
        "as misses in `hit_ratio`. Our texts have at most 160 tokens (small-moe) or 250, the "
        "published samples 512: forgiven first touches add up to 5 points at 30 slots to ours and "
        "1.5 to those.",
        "",
        *_table(
            [
                *("", "experts", "2 top-k slots: at random", "LRU", "Belady"),
                *("half of the experts: at random", "LRU", "Belady"),
            ],
            rows,
        ),
        "",
        f"Published: {results['published']['source']}. At most 100 texts of 512 "
        "tokens of a recording.",
    ]


def _hit_columns(row: dict[str, Any]) -> list[list[float]]:
    return [row["slots_share_ratio"], row["lru_ratio"], row["oracle_ratio"]]


def _topk(shape: str) -> int:
    return int(shape.rpartition("-")[2])


def _published_half(published: dict[str, Any]) -> list[str]:
    curves = published["hit_ratio_warm"]
    return [format_ratio(0.5), *(format_ratio(curves[one]["30"]) for one in ("lru", "oracle"))]


def _ahead(results: dict[str, Any]) -> list[str]:
    rows = []
    for name, recording in results["recording"].items():
        for ahead, recall in recording["lookahead_recall"].items():
            first, second = recall.items()
            cells = (f"{key.removeprefix('best_')}: {value:.3f}" for key, value in (first, second))
            rows.append([name, ahead, *cells])
    return [
        "![Recall and reuse by layer](figures/layers.png)",
        "",
        "Share of a layer's experts that its own norm and gate name from the stream that enters "
        "an earlier layer's experts (`lookahead` in the trace): among as many as a token uses, and "
        "among more. The lowest layers are foretold worst.",
        "",
        *_table(["model", "layers ahead", "recall of the best", "recall of the best"], rows),
    ]


def _domains(results: dict[str, Any]) -> list[str]:
    rows = {f"**{name}**": row["domains"] for name, row in results["recording"].items()}
    rows |= {
        RECORDINGS.get(name, (name, "", ""))[0]: row["domains"]
        for name, row in results["recorded_models"].items()
        if "domains" in row
    }
    keys = ("same_domain_hit_ratio", "other_domain_hit_ratio")
    table = [
        [
            name,
            f"{row['within_domain_distance']:.3f}",
            f"{row['between_domains_distance']:.3f}",
            *(
                format_ratio(row[share][key])
                for share in ("pinned_0.25", "pinned_0.5")
                for key in keys
            ),
        ]
        for name, row in rows.items()
    ]
    return [
        "![Distance between domains](figures/domains.png)",
        "",
        "Total variation between the expert frequencies of two halves of the texts, mean of layers "
        "(in the figure in percent; the diagonal is what chance leaves within a domain). A "
        "*profile* pins the most frequent experts of one half and is tried on the other half of "
        "the same domain, or on another domain; at random it hits its share. Domains of "
        "DeepSeek-V2-Lite are four tasks, those of gpt-oss-20b the data sets of its prompts. A "
        "half of a domain of tiny-moe has two or three texts, so its numbers are rough.",
        "",
        *_table(
            [
                *("", "within a domain", "between two"),
                *("a quarter pinned: same domain", "other domain", "half: same domain", "other"),
            ],
            table,
        ),
    ]


def _corpus(corpus: dict[str, Any]) -> list[str]:
    return [
        f"{corpus['num_train_tokens'] / 1e6:.1f} M tokens, {_num_bytes(corpus) / 1e6:.1f} MB of "
        f"text, a tenth from each of ten domains; SHA-256 of the tokens "
        f"`{corpus['train_sha256']}`. The text is not part of the project. Its sources, with the "
        "versions that were read and their licences:",
        "",
        *_table(
            ["package", "version", "licence", "domains"],
            [
                [
                    f"{one['registry']}: `{one['name']}`",
                    one["version"],
                    one["licence"],
                    ", ".join(one["domains"]),
                ]
                for one in corpus["packages"]
            ],
        ),
    ]


def _samples(samples: dict[str, Any]) -> list[str]:
    lines = []
    for model, texts in samples.items():
        for domain, sample in texts.items():
            lines += [f"### {model}: {domain}", "", "````text"]
            lines += [sample["prompt"] + " [...] " + sample["text"], "````", ""]
    return lines


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
