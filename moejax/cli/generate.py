"""`moejax generate`: a model's answer to a prompt, token by token."""

import enum
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moejax.errors import UsageError
from moejax.units import format_seconds

from ._generation import (
    DEFAULT_CHECKPOINT,
    DEFAULT_NEW_TOKENS,
    ChatOption,
    CheckpointOption,
    IgnoreEosOption,
    Prompt,
    TemperatureOption,
    TopPOption,
    WeightType,
    WeightTypeOption,
    encode_prompt,
    exact_products,
    find_checkpoint,
    load_model,
    open_text,
    parse_token_ids,
    read_sampling,
    read_text,
    room_behind,
    stop_tokens,
    weight_dtype,
)
from ._offload import (
    BudgetOption,
    IncludeDenseOption,
    KernelsOption,
    OffloadOptions,
    PlanOption,
    ProfileOption,
    ScopeOption,
    SharingOption,
    SlotsOption,
    StrategyOption,
    describe_offload,
    is_offloaded,
    open_offloaded,
    say_offload,
)
from ._options import SeedOption
from ._output import OutputFormat, emit
from ._progress import say

if TYPE_CHECKING:
    from moejax.engine import Generation
    from moejax.qwen_moe.tokenizer import TextStream


# Unicode has a picture of each control character of ASCII; for the others stands its mark U+FFFD.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
_PICTURES |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


class AnswerFormat(enum.StrEnum):
    """How the answer is printed."""

    text = "text"
    json = "json"


def generate(
    model: CheckpointOption = DEFAULT_CHECKPOINT,
    prompt: Annotated[
        str, typer.Option("--prompt", metavar="TEXT", help="What to go on from; - reads stdin.")
    ] = "",
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", metavar="FILE", help="A file with the prompt.")
    ] = None,
    prompt_ids: Annotated[
        str,
        typer.Option(
            "--prompt-ids", metavar="NUMBERS", help="The prompt as token numbers, with commas."
        ),
    ] = "",
    chat: ChatOption = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            min=1,
            help=f"Tokens after which to stop; default: {DEFAULT_NEW_TOKENS}, or what fits.",
        ),
    ] = None,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    ignore_eos: IgnoreEosOption = False,
    weight_type: WeightTypeOption = WeightType.checkpoint,
    budget: BudgetOption = "",
    slots: SlotsOption = None,
    plan: PlanOption = None,
    scope: ScopeOption = None,
    strategy: StrategyOption = None,
    include_dense: IncludeDenseOption = False,
    profile: ProfileOption = None,
    kernels: KernelsOption = None,
    devices: SharingOption = 1,
    logits: Annotated[
        bool,
        typer.Option("--logits", help="Add the logits behind the prompt; with -o json only."),
    ] = False,
    output: Annotated[
        AnswerFormat,
        typer.Option("--output", "-o", help="The text as it comes, or all facts at the end."),
    ] = AnswerFormat.text,
) -> None:
    """Continue a prompt with a Qwen1.5-MoE checkpoint.

    Every expert is on the device, or with --budget, --slots or --plan only some: the others wait
    in host memory and a strategy says which; what it says changes the speed, never the text. With
    --devices several devices share the experts, each with slots and a link of its own.

    The text goes to stdout as it comes, times to stderr: TTFT until the first token, TPOT from
    one token to the next; compilation comes before both and is told apart. The same seed, prompt
    and settings give the same text on the same machine and versions. `-o json` has the token
    numbers, to compare with other implementations; without a tokenizer.json, --prompt-ids still
    works.

    Example: moejax generate --prompt "The " --max-new-tokens 64
    """
    options = OffloadOptions(
        budget, slots, plan, scope, strategy, include_dense, profile, kernels, devices
    )
    offloads = is_offloaded(options)
    given = _given_prompt(prompt, prompt_file, prompt_ids)
    if logits and output is not AnswerFormat.json:
        raise UsageError("--logits prints numbers, not text", "Add -o json.")
    if chat and prompt_ids:
        raise UsageError("--chat needs a text and --prompt-ids has none", "Use --prompt.")
    from moejax.engine import Engine
    from moejax.results import capture_environment

    sampling = read_sampling(temperature, top_p)
    checkpoint = find_checkpoint(model)
    tokenizer = open_text(checkpoint, [given])
    ids = encode_prompt(
        given, checkpoint, tokenizer, is_chat=chat, max_new_tokens=max_new_tokens or 1
    )
    max_new_tokens = max_new_tokens or min(DEFAULT_NEW_TOKENS, room_behind(ids, checkpoint))
    stop_token_ids = stop_tokens(checkpoint, tokenizer, ignore_eos)
    dtype = weight_dtype(checkpoint, weight_type)
    opened = None
    if offloads:
        opened = open_offloaded(
            checkpoint,
            weight_type,
            options,
            num_tokens=len(ids),
            max_new_tokens=max_new_tokens,
        )
    engine = Engine(load_model(checkpoint, weight_type)) if opened is None else opened.engine
    with exact_products(dtype):
        generation = engine.generate(
            [ids],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            stop_token_ids=stop_token_ids,
        )
        stream = None if tokenizer is None else tokenizer.stream()
        text = _follow(generation, stream, stop_token_ids, is_shown=output is AnswerFormat.text)
    if output is AnswerFormat.text:
        _say_times(generation, num_prompt_tokens=len(ids))
        if opened is not None:
            say_offload(describe_offload(opened, generation))
        return
    record = {
        "model": checkpoint.name,
        "dtype": dtype,
        "prompt": given.content if isinstance(given.content, str) else None,
        "prompt_ids": ids,
        "token_ids": generation.token_ids[0],
        "text": None if tokenizer is None else text,
        "finish_reason": generation.finish_reasons[0],
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        **_times(generation),
    }
    if opened is not None:
        record["offload"] = describe_offload(opened, generation)
    if logits and generation.prompt_logits is not None:
        record["logits"] = generation.prompt_logits[0]
    emit(record | {"environment": capture_environment(seed)}, OutputFormat.json)


def _given_prompt(text: str, path: Path | None, ids: str) -> Prompt:
    """The one prompt that was given.

    Raises:
      UsageError: None was, or several.
      BadFileError: Its file cannot be read.
    """
    options = {"--prompt": text, "--prompt-file": path, "--prompt-ids": ids}
    names = [name for name, value in options.items() if value not in ("", None)]
    if len(names) != 1:
        cause = f"{' and '.join(names)} exclude each other" if names else "there is no prompt"
        raise UsageError(cause, 'Give --prompt "TEXT", --prompt-file FILE or --prompt-ids 1,2,3.')
    if ids:
        return Prompt(parse_token_ids(ids), "--prompt-ids")
    if path is not None or text == "-":
        return Prompt(read_text(path), f"the prompt of {path or 'stdin'}")
    return Prompt(text, "--prompt")


def _follow(
    generation: "Generation",
    stream: "TextStream | None",
    stop_token_ids: tuple[int, ...],
    *,
    is_shown: bool,
) -> str:
    """Takes all steps and shows each token's text; without a tokenizer its number.

    What has come is whole on stdout even if the rest is interrupted.
    """
    pieces: list[str] = []

    def take(piece: str) -> None:
        pieces.append(piece)
        if is_shown:
            _print_now(piece)

    try:
        for step in generation:
            token = int(step.token_ids[0])
            if stream is None:
                take(f" {token}" if pieces else str(token))
            elif token not in stop_token_ids:
                take(stream.push(token))
    finally:
        take("" if stream is None else stream.flush())
        if is_shown:
            _print_now("\n")
    return "".join(pieces)


def _print_now(text: str) -> None:
    # A model may say anything, but on a terminal it must not move the cursor or ring the bell.
    if sys.stdout.isatty():
        text = text.translate(_PICTURES)
    # A terminal that cannot show a character shows a question mark, and the text goes on.
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def _times(generation: "Generation") -> dict[str, Any]:
    """Times of a generation; without a second token there is no time per token."""
    import numpy as np

    timing = generation.timing
    steps = timing.step_s
    record = {"compile_s": timing.compile_s, "ttft_s": timing.ttft_s, "tpot_s": None}
    if not steps:
        return record | {"decode_tokens_per_s": None}
    median, p95 = np.percentile(steps, [50, 95])
    record["tpot_s"] = {"median": median, "p95": p95, "samples": steps}
    return record | {"decode_tokens_per_s": len(steps) / sum(steps)}


def _say_times(generation: "Generation", num_prompt_tokens: int) -> None:
    times = _times(generation)
    parts = [f"prompt {num_prompt_tokens:,} tokens", f"TTFT {format_seconds(times['ttft_s'])}"]
    parts += [f"new {len(generation.token_ids[0]):,} tokens ({generation.finish_reasons[0]})"]
    if times["tpot_s"] is not None:
        median, p95 = (format_seconds(times["tpot_s"][key]) for key in ("median", "p95"))
        rate = times["decode_tokens_per_s"]
        parts += [f"TPOT median {median}, p95 {p95}", f"{rate:.3g} tokens/s"]
    say(", ".join(parts))
    say(f"compiled in {format_seconds(times['compile_s'])}, before that clock started")
