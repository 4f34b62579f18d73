"""What the commands that run a model share: its options, its prompts, and how it is opened."""

import enum
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, TypeAlias

import typer

from moejax.errors import BadFileError, MoejaxError, UsageError

from ._progress import show_progress

if TYPE_CHECKING:
    from moejax.engine import Sampling
    from moejax.qwen_moe import QwenMoe, QwenMoeConfig
    from moejax.qwen_moe.params import Checkpoint
    from moejax.qwen_moe.tokenizer import Tokenizer

DEFAULT_CHECKPOINT = "tiny-moe"
DEFAULT_NEW_TOKENS = 128

_JSON_LINES = ".jsonl"


class WeightType(enum.StrEnum):
    """What weights become when they are loaded."""

    checkpoint = "checkpoint"
    float32 = "float32"
    bfloat16 = "bfloat16"


CheckpointOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="PATH",
        help="Folder of a Qwen1.5-MoE checkpoint, a hub id that was downloaded before, or "
        "tiny-moe, which comes with moejax.",
    ),
]
TemperatureOption: TypeAlias = Annotated[
    float,
    typer.Option("--temperature", help="Draw tokens at this temperature; 0 takes the likeliest."),
]
TopPOption: TypeAlias = Annotated[
    float,
    typer.Option(
        "--top-p", help="Draw from the likeliest tokens that together have this probability."
    ),
]
ChatOption: TypeAlias = Annotated[
    bool,
    typer.Option("--chat", help="Give the prompt as a user's message, by the model's template."),
]
IgnoreEosOption: TypeAlias = Annotated[
    bool, typer.Option("--ignore-eos", help="Go on after a token that ends a text.")
]
WeightTypeOption: TypeAlias = Annotated[
    WeightType,
    typer.Option(
        "--dtype",
        help="Type to compute in. float32 takes twice the memory of bfloat16; only in float32 do "
        "implementations agree token for token.",
    ),
]


class NamedCheckpoint(NamedTuple):
    """A model whose weights are not read yet.

    Attributes:
      name: Name of its card where there is one, else of its folder.
      files: Its folder.
      config: What it is made of.
    """

    name: str
    files: "Checkpoint"
    config: "QwenMoeConfig"


class Prompt(NamedTuple):
    """A text or token numbers, and where they were given."""

    content: str | tuple[int, ...]
    where: str


def find_checkpoint(model: str) -> NamedCheckpoint:
    """Finds a checkpoint and reads what it is made of, but no weights.

    Raises:
      UsageError: There is no checkpoint of this name.
      BadFileError: Its files are corrupt, incomplete or of another architecture.
    """
    from moejax.qwen_moe import read_config
    from moejax.qwen_moe.params import open_checkpoint

    if not model.strip():
        raise UsageError("--model is empty", f"Leave it out to take {DEFAULT_CHECKPOINT}.")
    files = open_checkpoint(model)
    config = read_config(files.config, str(files.path / "config.json"))
    return NamedCheckpoint(_name(model, files.path), files, config)


def load_model(
    checkpoint: NamedCheckpoint, weight_type: WeightType, *, routed_experts: bool = True
) -> "QwenMoe":
    """Reads the weights, with a bar for the person who waits.

    Args:
      checkpoint: The model.
      weight_type: What weights become.
      routed_experts: Whether the routed experts are read too.

    Raises:
      BadFileError: The weights are corrupt, incomplete or not of this architecture.
      UsageError: A weight does not fit the type.
    """
    from moejax.qwen_moe.params import load

    with show_progress("loading") as progress:
        return load(
            checkpoint.files,
            dtype=weight_dtype(checkpoint, weight_type),
            routed_experts=routed_experts,
            on_progress=lambda done, all_: progress(done // 10**6, all_ // 10**6, "MB"),
        )


def weight_dtype(checkpoint: NamedCheckpoint, weight_type: WeightType) -> str:
    """Name of the type that the weights have once they are loaded."""
    from moejax.qwen_moe.params import chosen_dtype

    asked = None if weight_type is WeightType.checkpoint else weight_type.value
    return chosen_dtype(checkpoint.files, checkpoint.config, asked).name


def read_sampling(temperature: float, top_p: float) -> "Sampling":
    """How tokens are chosen.

    Raises:
      UsageError: A value is out of range; the message names its option.
    """
    from moejax.engine import Sampling

    for option, values in (("--temperature", (temperature, 1.0)), ("--top-p", (0.0, top_p))):
        try:
            Sampling(*values)
        except UsageError as error:
            raise UsageError(f"{option}: {error.cause}", error.hint) from None
    return Sampling(temperature, top_p)


def exact_float32(model: "QwenMoe") -> AbstractContextManager[None]:
    """Keeps accelerators from rounding the factors of float32 products, as they do for speed."""
    return exact_products(str(model.embed_tokens.weight.dtype))


@contextmanager
def exact_products(dtype: str) -> Iterator[None]:
    """The same for a model whose weights are of this type."""
    import jax

    if dtype != "float32":
        yield
        return
    with jax.default_matmul_precision("highest"):
        yield


def open_text(checkpoint: NamedCheckpoint, prompts: Sequence[Prompt]) -> "Tokenizer | None":
    """The checkpoint's tokenizer; None where it has none and no prompt needs one.

    Raises:
      BadFileError: A prompt is text and there is no tokenizer, or it is corrupt.
    """
    from moejax.qwen_moe.tokenizer import has_tokenizer, open_tokenizer

    is_needed = any(isinstance(prompt.content, str) for prompt in prompts)
    folder = checkpoint.files.path
    return open_tokenizer(folder) if is_needed or has_tokenizer(folder) else None


def stop_tokens(
    checkpoint: NamedCheckpoint, tokenizer: "Tokenizer | None", ignore_eos: bool
) -> tuple[int, ...]:
    """The tokens that end a text.

    Raises:
      BadFileError: The checkpoint names one that its model does not have.
    """
    from moejax.qwen_moe.tokenizer import read_eos_ids

    if ignore_eos:
        return ()
    return read_eos_ids(checkpoint.files.path) if tokenizer is None else tokenizer.eos_ids


def encode_prompt(
    prompt: Prompt,
    checkpoint: NamedCheckpoint,
    tokenizer: "Tokenizer | None",
    *,
    is_chat: bool,
    max_new_tokens: int,
) -> list[int]:
    """Token numbers of a prompt that the model can read and answer.

    Raises:
      UsageError: The prompt is empty, holds tokens that the model does not have, or leaves no
        room for the answer.
      BadFileError: The tokenizer or the chat template fails.
    """
    config, content = checkpoint.config, prompt.content
    try:
        if isinstance(content, str) and tokenizer is not None:
            message = {"role": "user", "content": content}
            ids = tokenizer.chat([message]) if is_chat else tokenizer.encode(content)
        else:
            ids = [int(token) for token in content]
    except MoejaxError as error:
        raise type(error)(f"{prompt.where}: {error.cause}", error.hint) from None
    if not ids:
        raise UsageError(f"{prompt.where} holds no tokens", "A model needs at least one to go on.")
    unknown = next((token for token in ids if not 0 <= token < config.vocab_size), None)
    if unknown is not None:
        cure = f"Tokens of {checkpoint.name} are numbers from 0 to {config.vocab_size - 1}."
        if isinstance(content, str):
            cure += " Its tokenizer.json belongs to another model."
        raise UsageError(f"{prompt.where}: token {unknown} is not in the vocabulary", cure)
    room = room_behind(ids, checkpoint)
    if room < max_new_tokens:
        cure = f"Take --max-new-tokens {room} at most." if room > 0 else "Shorten the prompt."
        raise UsageError(
            f"{prompt.where}: {len(ids):,} tokens and {max_new_tokens:,} new ones exceed the "
            f"{config.max_position_embeddings:,} positions of {checkpoint.name}",
            cure,
        )
    return ids


def room_behind(ids: Sequence[int], checkpoint: NamedCheckpoint) -> int:
    """New tokens that fit behind a prompt."""
    # The last one is never read, so it needs no position.
    return checkpoint.config.max_position_embeddings - len(ids) + 1


def parse_token_ids(text: str) -> tuple[int, ...]:
    """Reads a comma list of token numbers, in which a number may come again.

    Raises:
      UsageError: An item is no whole number.
    """
    try:
        return tuple(int(item) for item in text.split(","))
    except ValueError:
        raise UsageError(
            f"--prompt-ids: {text!r} is not a list of token numbers", "Write them so: 1,306,4658."
        ) from None


def read_text(path: Path | None) -> str:
    """A text file, or with None what comes on stdin; UTF-8, without a byte order mark.

    Raises:
      BadFileError: It cannot be read, or is not UTF-8.
    """
    name = "stdin" if path is None else str(path)
    try:
        content = sys.stdin.buffer.read() if path is None else path.read_bytes()
        return content.decode("utf-8").removeprefix("\ufeff")
    except OSError as error:
        cause = f"{name} cannot be read: {error.strerror or error}"
        raise BadFileError(cause, "Give the path of a text file.") from error
    except UnicodeDecodeError as error:
        cause = f"{name} is not UTF-8 at byte {error.start}"
        raise BadFileError(cause, "Write it as UTF-8.") from error


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a file: one a line, or in a `.jsonl` file one object a line; `-` reads stdin.

    An object has `prompt`, a text, or `prompt_ids`, a list of numbers; its other fields are left
    alone. Blank lines are skipped.

    Raises:
      BadFileError: The file cannot be read, holds no prompt, or a line is no such object.
    """
    # Only the line ends of files: U+2028 and its like may stand inside a prompt.
    is_stdin = str(path) == "-"
    name = "stdin" if is_stdin else str(path)
    lines = read_text(None if is_stdin else path).replace("\r\n", "\n").split("\n")
    places = [(f"{name}:{number}", line) for number, line in enumerate(lines, start=1)]
    prompts = [
        _read_object(line, where) if path.suffix == _JSON_LINES else Prompt(line, where)
        for where, line in places
        if line.strip()
    ]
    if not prompts:
        raise BadFileError(f"{name} holds no prompt", "Write one a line.")
    return prompts


def _read_object(line: str, where: str) -> Prompt:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadFileError(f"{where} is not JSON: {error}", "Write one object a line.") from error
    fields = fields if isinstance(fields, dict) else {}
    text, ids = fields.get("prompt"), fields.get("prompt_ids")
    if text is not None and ids is not None:
        problem = "has both `prompt` and `prompt_ids`"
    elif isinstance(text, str):
        return Prompt(text, where)
    elif isinstance(ids, list) and all(type(token) is int for token in ids):
        return Prompt(tuple(ids), where)
    elif text is not None:
        problem = f"has a `prompt` that is no text: {json.dumps(text):.60}"
    elif ids is not None:
        problem = f"has `prompt_ids` that are no list of whole numbers: {json.dumps(ids):.60}"
    else:
        problem = "has neither `prompt` nor `prompt_ids`"
    raise BadFileError(
        f"{where} {problem}", 'Write {"prompt": "..."} or {"prompt_ids": [1, 2, 3]}.'
    )


def _name(model: str, path: Path) -> str:
    """The name that other commands know the model by.

    A folder of the hub's cache is called after a commit, so there the id names the model.
    """
    from moejax.cards import MODELS

    name = path.resolve().name if Path(model).is_dir() else model.rpartition("/")[2]
    return name.lower() if name.lower() in MODELS else name
