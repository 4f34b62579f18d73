"""`moejax trace`: getting routing traces, and looking at them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moejax.errors import UsageError

from ._generation import (
    DEFAULT_CHECKPOINT,
    DEFAULT_NEW_TOKENS,
    ChatOption,
    CheckpointOption,
    IgnoreEosOption,
    TemperatureOption,
    TopPOption,
    WeightType,
    WeightTypeOption,
    encode_prompt,
    exact_float32,
    find_checkpoint,
    load_model,
    open_text,
    read_prompts,
    read_sampling,
    stop_tokens,
)
from ._options import EXIT_CODES, OfflineOption, OutputOption, SeedOption
from ._output import OutputFormat, emit
from ._progress import say, show_progress
from ._routing import check_workload

if TYPE_CHECKING:
    from moejax.trace import Trace

app = typer.Typer(name="trace", help="Import, record, make and inspect routing traces.")

_SUFFIX = ".safetensors"


@app.command("import", epilog=EXIT_CODES)
def import_(
    source: Annotated[
        Path, typer.Argument(metavar="FILE", help="Recorded routing: npz, route CSV or JSON lines.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE.safetensors", help="Where the trace goes; default: beside FILE."
        ),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="MODEL", help="Model whose routing it is.")
    ] = "",
    num_experts: Annotated[
        int | None,
        typer.Option("--num-experts", min=1, help="Experts of a layer, if the file does not say."),
    ] = None,
    origin: Annotated[
        str, typer.Option("--source", metavar="TEXT", help="Where the recording comes from.")
    ] = "",
    licence: Annotated[
        str, typer.Option("--licence", metavar="TEXT", help="Its licence, carried along.")
    ] = "",
    offline: OfflineOption = False,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Turn recorded routing into a trace file.

    FILE is an .npz with `expert_ids` [tokens, layers, topk] and optionally `offsets`, `phase`,
    `gate_weight`, `token_id`; a CSV with a line per token, layer and expert; or JSON lines with
    `token_idx`, `layer_idx`, `selected_ids`. 255 or -1 stands for an expert not computed.

    Example: moejax trace import routing.npz --model gpt-oss-20b --out gpt-oss.safetensors
    """
    from moejax.cards import load_model
    from moejax.trace import import_trace, save_trace

    target = None if out is None else _target(out)
    spec = load_model(model, offline=offline) if model else None
    if num_experts is None and spec is not None:
        num_experts = spec.num_experts
    trace = import_trace(
        source,
        model=spec.name if spec is not None else None,
        num_experts=num_experts,
        source=origin,
        licence=licence,
    )
    target = target or source.with_suffix(_SUFFIX)
    save_trace(trace, target)
    _say_warnings(trace)
    emit({"file": str(target), **_summary(trace)}, output)


@app.command(epilog=EXIT_CODES)
def record(
    prompts: Annotated[
        Path,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="One prompt a line; in a .jsonl file an object with `prompt` or `prompt_ids`. "
            "Blank lines are skipped; - reads lines from stdin.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE.safetensors", help="Where the trace goes.")
    ],
    model: CheckpointOption = DEFAULT_CHECKPOINT,
    chat: ChatOption = False,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens",
            min=1,
            help="New tokens after each prompt. A token is routed when it is read, which the last "
            "one never is: N new tokens are N-1 decode tokens of the trace.",
        ),
    ] = DEFAULT_NEW_TOKENS,
    batch_size: Annotated[
        int,
        typer.Option(
            "--batch-size",
            min=1,
            help="Prompts that are run at once. In bfloat16 rounding differs from size to size, "
            "and a text can too, a sampled one sooner.",
        ),
    ] = 1,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            min=0,
            max=2**32 - 1,
            help="Seed of everything that is drawn; a text follows from it for one --batch-size.",
        ),
    ] = 0,
    ignore_eos: IgnoreEosOption = False,
    lookahead_depth: Annotated[
        int,
        typer.Option(
            "--lookahead-depth",
            min=0,
            help="Next layers whose gates are asked too, if there are as many; 0 for none.",
        ),
    ] = 3,
    lookahead_width: Annotated[
        int | None,
        typer.Option(
            "--lookahead-width", min=1, help="Experts they name; default: twice a token's own."
        ),
    ] = None,
    weight_type: WeightTypeOption = WeightType.checkpoint,
    origin: Annotated[
        str, typer.Option("--source", metavar="TEXT", help="What the prompts are.")
    ] = "",
    licence: Annotated[
        str, typer.Option("--licence", metavar="TEXT", help="The trace's licence, carried along.")
    ] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Replace the file of --out if it is there already.")
    ] = False,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Let a model go on from prompts and record where its router sends every token.

    The trace has phases, routing weights, token numbers and what the gates of the next layers say
    of each layer's hidden state. Token numbers let the texts be read again: mind what the prompts
    hold. An interrupted run goes on where it stopped when the same command is given again.

    Example: moejax trace record --prompts prompts.txt --max-new-tokens 64 --out tiny.safetensors
    """
    target = _target(out)
    if target.is_file() and not force:
        raise UsageError(
            f"--out {target} is there already", "Give another one, or --force to replace it."
        )
    given = read_prompts(prompts)
    from moejax import engine

    sampling = read_sampling(temperature, top_p)
    checkpoint = find_checkpoint(model)
    tokenizer = open_text(checkpoint, given)
    token_ids = [
        encode_prompt(one, checkpoint, tokenizer, is_chat=chat, max_new_tokens=max_new_tokens)
        for one in given
    ]
    lookahead = engine.default_lookahead(checkpoint.config, lookahead_depth)
    if lookahead is not None and lookahead_width is not None:
        lookahead = lookahead._replace(width=lookahead_width)
    stop_token_ids = stop_tokens(checkpoint, tokenizer, ignore_eos)
    network = load_model(checkpoint, weight_type)
    prompts_name = "stdin" if str(prompts) == "-" else prompts.name
    try:
        with exact_float32(network), show_progress("recording") as progress:
            trace = engine.record(
                engine.Engine(network),
                token_ids,
                max_new_tokens=max_new_tokens,
                out=target,
                batch_size=batch_size,
                sampling=sampling,
                seed=seed,
                stop_token_ids=stop_token_ids,
                lookahead=lookahead,
                model_name=checkpoint.name,
                source=origin or f"{checkpoint.name} on {prompts_name}",
                licence=licence,
                on_progress=progress,
                on_note=say,
            )
    except KeyboardInterrupt:
        say("what was recorded is kept: the same command goes on from there")
        raise
    emit({"file": str(target), **_summary(trace)}, output)


@app.command(epilog=EXIT_CODES)
def make(
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE.safetensors", help="Where the trace goes.")
    ],
    workload: Annotated[
        str, typer.Option("--workload", metavar="NAME", help="Synthetic routing to draw from.")
    ] = "qwen1.5-moe",
    num_requests: Annotated[int, typer.Option("--requests", min=1, help="Requests to draw.")] = 16,
    tokens_per_request: Annotated[
        int, typer.Option("--tokens", min=1, help="Tokens of each request.")
    ] = 256,
    seed: SeedOption = 0,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Draw a synthetic trace whose statistics are calibrated to published ones.

    Example: moejax trace make --workload qwen1.5-moe --requests 8 --out synthetic.safetensors
    """
    from moejax.trace import save_trace
    from moejax.workloads import WORKLOADS, make_trace

    target = _target(out)
    trace = make_trace(
        WORKLOADS[check_workload(workload)],
        num_requests=num_requests,
        tokens_per_request=tokens_per_request,
        seed=seed,
    )
    save_trace(trace, target)
    emit({"file": str(target), **_summary(trace)}, output)


@app.command(epilog=EXIT_CODES)
def info(
    source: Annotated[
        str,
        typer.Argument(
            metavar="TRACE",
            help="A trace file, or the name of a trace that comes with moejax.",
        ),
    ],
    output: OutputOption = OutputFormat.table,
) -> None:
    """Show a trace's shape, source and statistics: reuse, Gini, next-layer recall.

    Of a trace that comes with moejax, also what its card says it is.

    Example: moejax trace info small-moe -o json
    """
    from moejax.results import to_plain
    from moejax.trace import load_trace, statistics, trace_note

    trace = load_trace(source)
    note = trace_note(source)
    record = {"file": source, **_summary(trace), **to_plain(statistics(trace))}
    _say_warnings(trace)
    if note:
        say(f"note: {note}")
        record["note"] = note
    # Values per layer are for programs; a person reads the averages, and the note above them.
    columns = [key for key in record if not key.startswith("per_layer_") and key != "note"]
    emit(record, output, columns=columns)


def _target(path: Path) -> Path:
    if path.suffix != _SUFFIX:
        raise UsageError(f"--out {path} is not a {_SUFFIX} file", "Traces have that ending.")
    return path


def _summary(trace: "Trace") -> dict[str, Any]:
    record: dict[str, Any] = {
        "num_tokens": trace.num_tokens,
        "num_layers": trace.num_layers,
        "topk": trace.topk,
        "num_experts": trace.num_experts,
        "num_requests": trace.num_requests,
        "num_decode_tokens": None if trace.phase is None else int((trace.phase == 1).sum()),
    }
    optional = ("phase", "routing_weights", "token_ids", "lookahead", "expert_bytes")
    record["also_holds"] = [name for name in optional if getattr(trace, name) is not None]
    for name in ("is_router_order", "model", "source", "licence", "workload", "sha256"):
        record[name] = getattr(trace, name)
    return record


def _say_warnings(trace: "Trace") -> None:
    for warning in trace.warnings:
        say(f"warning: {warning}")
