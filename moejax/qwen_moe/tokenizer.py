"""A checkpoint's tokenizer: text to tokens and back, chat templates, tokens that end a text."""

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as Backend

from moejax.cards import read_card
from moejax.errors import BadFileError, UsageError

_TOKENIZER_FILE = "tokenizer.json"
_SETTINGS_FILE = "tokenizer_config.json"
_TEMPLATE_FILE = "chat_template.jinja"
_CONFIG_FILE = "config.json"
# The first that names end tokens is believed, as in transformers' generate.
_EOS_FILES = ("generation_config.json", _CONFIG_FILE)
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
_HINT = "Copy the file from the place that the checkpoint came from."

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# Four bytes make the longest character of UTF-8, so at most three may wait for their last.
_MAX_UNFINISHED = 3


@dataclass(frozen=True)
class Tokenizer:
    """Text to tokens and back, as the checkpoint's own files say.

    Attributes:
      backend: What `tokenizer.json` describes.
      eos_ids: Tokens that end a text; empty where no file names one.
      template: Chat template in Jinja; None where the folder has none.
      special_tokens: Texts of the special tokens by their role, for the template.
      where: The folder, for error messages.
    """

    backend: Backend
    eos_ids: tuple[int, ...]
    template: str | None
    special_tokens: Mapping[str, str]
    where: str

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, with those that the tokenizer puts around every text.

        Raises:
          UsageError: The text is not Unicode: a file or argument in another encoding.
          BadFileError: The tokenizer has no token for a part of the text.
        """
        return self._encode(text, add_special_tokens=True)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, without special ones and those that the tokenizer does not know."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Tokens of a conversation up to where the model is to answer.

        Args:
          messages: Each with `role` (`system`, `user`, `assistant`) and `content`.

        Raises:
          UsageError: The folder has no chat template, or a message is not Unicode.
          BadFileError: The template is no Jinja, or refuses this conversation.
        """
        if self.template is None:
            raise UsageError(
                f"{self.where} has no chat template",
                "Leave the template out: the prompt then goes to the model as it is.",
            )
        try:
            text = (
                _environment()
                .from_string(self.template)
                .render(
                    messages=[dict(message) for message in messages],
                    add_generation_prompt=True,
                    **self.special_tokens,
                )
            )
        except Exception as error:  # A template is a program: it can fail in every way.
            raise BadFileError(
                f"{self.where}: the chat template fails: {_first_line(error)}",
                "Mend the template, or leave it out.",
            ) from error
        # The template has written the special tokens itself.
        return self._encode(text, add_special_tokens=False)

    def stream(self) -> "TextStream":
        """A decoder for tokens that come one by one."""
        return TextStream(self)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the text is not Unicode at character {error.start}", "Write it as UTF-8."
            ) from error
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:
            path = f"{self.where}/{_TOKENIZER_FILE}"
            raise BadFileError(
                f"{path} cannot encode the text: {_first_line(error)}", _HINT
            ) from error


@dataclass
class TextStream:
    """Decodes tokens as they come and never gives out half a character.

    Attributes:
      tokenizer: What decodes.
      ids: Tokens whose text is not settled yet, after those that only give it context.
    """

    tokenizer: Tokenizer
    ids: list[int] = field(default_factory=list)
    _num_context: int = 0
    _num_printed: int = 0

    def push(self, token: int) -> str:
        """The text that is certain once this token has come; may be empty."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        num_waiting = len(text) - len(text.rstrip(_UNFINISHED))
        new = text[self._num_printed : len(text) - min(num_waiting, _MAX_UNFINISHED)]
        self._num_printed += len(new)
        if not num_waiting:
            self._forget()
        return new

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        rest = self.tokenizer.decode(self.ids)[self._num_printed :]
        self._num_printed += len(rest)
        return rest

    def _forget(self) -> None:
        # One settled piece stays: some decoders drop the space before the first token they see.
        self.ids = self.ids[self._num_context :]
        self._num_context = len(self.ids)
        self._num_printed = len(self.tokenizer.decode(self.ids))


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a checkpoint folder can turn text into tokens."""
    return (Path(folder) / _TOKENIZER_FILE).is_file()


def open_tokenizer(folder: str | Path) -> Tokenizer:
    """Reads `tokenizer.json` and, where they exist, the chat template and the end tokens.

    Raises:
      BadFileError: `tokenizer.json` is missing, or one of the files is corrupt.
    """
    folder = Path(folder)
    path = folder / _TOKENIZER_FILE
    if not path.is_file():
        raise BadFileError(
            f"{folder} has no {_TOKENIZER_FILE}",
            "Save it there with AutoTokenizer.save_pretrained of transformers, or give token "
            "numbers instead of text.",
        )
    try:
        backend = Backend.from_str(path.read_text(encoding="utf-8"))
        # Settings of a training run; they would cut or fill up every prompt unseen.
        backend.no_truncation()
        backend.no_padding()
    except Exception as error:  # The library raises nothing more special.
        raise BadFileError(f"{path} is not a tokenizer: {_first_line(error)}", _HINT) from error
    settings = _read_optional(folder / _SETTINGS_FILE)
    special_tokens = _special_tokens(settings)
    eos_ids = read_eos_ids(folder)
    if not eos_ids and "eos_token" in special_tokens:
        token = backend.token_to_id(special_tokens["eos_token"])
        eos_ids = () if token is None else (token,)
    return Tokenizer(
        backend=backend,
        eos_ids=eos_ids,
        template=_template(folder, settings),
        special_tokens=special_tokens,
        where=str(folder),
    )


def read_eos_ids(folder: str | Path) -> tuple[int, ...]:
    """Tokens that end a text, as the folder's configurations say; empty where none does.

    Raises:
      BadFileError: A configuration cannot be read, or names something that is no token.
    """
    num_tokens = _read_optional(Path(folder) / _CONFIG_FILE).get("vocab_size")
    for name in _EOS_FILES:
        path = Path(folder) / name
        value = _read_optional(path).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(token) is int and token >= 0 for token in ids):
            raise BadFileError(
                f"{path}: eos_token_id = {value!r} is no token", "Write a number or a list of them."
            )
        if type(num_tokens) is int and max(ids, default=0) >= num_tokens:
            raise BadFileError(
                f"{path}: eos_token_id = {value!r}, but the vocabulary ends at {num_tokens - 1}",
                "The file belongs to another model: copy the one of this.",
            )
        return tuple(ids)
    return ()


def _read_optional(path: Path) -> dict[str, Any]:
    return read_card(path) if path.exists() else {}


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by role; the files spell each as a text or as a table with `content`."""
    tokens = {}
    for role in _SPECIAL_TOKENS:
        value = settings.get(role)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            tokens[role] = value
    return tokens


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template: a file of its own, or one text or several named ones in the settings.

    Raises:
      BadFileError: There is one and it cannot be read.
    """
    path = folder / _TEMPLATE_FILE
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise BadFileError(f"{path} cannot be read: {_first_line(error)}", _HINT) from error
    value = settings.get("chat_template")
    if isinstance(value, list):
        named = {
            entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)
        }
        value = named.get("default", named)
    if value is None or isinstance(value, str):
        return value
    raise BadFileError(
        f"{folder / _SETTINGS_FILE}: chat_template is neither a text nor a list with a default",
        _HINT,
    )


class _GenerationTag(Extension):
    """Reads over `generation` blocks, which only mark what to train on."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Any) -> list[Any]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """What chat templates expect of their surroundings, as transformers gives it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
    # Jinja's own escapes what HTML reserves.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
