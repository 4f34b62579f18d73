"""Settings from the environment and from a configuration file, below the options themselves.

For option `--batch-sizes` of `bench`, first found wins:
`--batch-sizes`, `MOEJAX_BENCH_BATCH_SIZES`, `MOEJAX_BATCH_SIZES`, `batch-sizes` under `[bench]` in
the file, `batch-sizes` at its top, the default.
"""

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moejax.errors import BadFileError, UsageError

CONFIG_NAME = "moejax.toml"

_FLAG_WORDS = {"1": True, "true": True, "yes": True, "on": True}
_FLAG_WORDS |= {"0": False, "false": False, "no": False, "off": False}


def load_settings(
    root: Any, path: str | Path | None, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Settings that take the place of the commands' own defaults.

    Args:
      root: The program's command group.
      path: The configuration file; None takes `moejax.toml` of the working folder if it exists.
      environment: Variables such as those of the process.

    Returns:
      A tree by command name, then by parameter name, as click's `default_map` wants it.

    Raises:
      BadFileError: The file is missing, not TOML, or holds a key or value that no command takes.
      UsageError: The variable of a flag is neither true nor false.
    """
    source = Path(CONFIG_NAME if path is None else path)
    table = {} if path is None and not source.is_file() else _read_toml(source)
    return _group_settings(root, table, {}, environment, ("MOEJAX",), source)


def _group_settings(
    group: Any,
    table: Mapping[str, Any],
    inherited: Mapping[str, Any],
    environment: Mapping[str, str],
    words: tuple[str, ...],
    source: Path,
) -> dict[str, Any]:
    # `trace` is both an option and a group: a value sets the one, a table the other.
    tables = {key: value for key, value in table.items() if isinstance(value, dict)}
    values = {key: value for key, value in table.items() if key not in tables}
    _check_keys(tables, group.commands, "command", source)
    _check_keys(values, _options_below(group), "option", source)
    inherited = {**inherited, **_scalars(values, source)}
    settings = {}
    for name, command in group.commands.items():
        inner = tables.get(name, {})
        inner_words = (*words, name)
        if _is_group(command):
            settings[name] = _group_settings(
                command, inner, inherited, environment, inner_words, source
            )
        else:
            _check_keys(inner, _options(command), f"option of {name}", source)
            file_values = {**inherited, **_scalars(inner, source)}
            settings[name] = _command_settings(command, file_values, environment, inner_words)
    return settings


def _command_settings(
    command: Any,
    file_values: Mapping[str, Any],
    environment: Mapping[str, str],
    words: tuple[str, ...],
) -> dict[str, Any]:
    settings = {}
    for key, option in _options(command).items():
        names = (_variable((*words, key)), _variable((words[0], key)))
        found = [(name, environment[name]) for name in names if environment.get(name)]
        if found:
            name, text = found[0]
            settings[option.name] = _parse_flag(name, text) if option.is_flag else text
        elif key in file_values:
            settings[option.name] = file_values[key]
        # An option that may be repeated wants a list; its commands read commas themselves.
        if option.multiple and option.name in settings:
            settings[option.name] = [settings[option.name]]
    return settings


def _options(command: Any) -> dict[str, Any]:
    """A command's options by long name without the dashes."""
    options = {}
    for parameter in command.params:
        if parameter.param_type_name == "option" and parameter.name != "help":
            longest = max(parameter.opts, key=len)
            options[longest.lstrip("-")] = parameter
    return options


def _options_below(group: Any) -> set[str]:
    names: set[str] = set()
    for command in group.commands.values():
        names |= _options_below(command) if _is_group(command) else set(_options(command))
    return names


def _is_group(command: Any) -> bool:
    return hasattr(command, "commands")


def _variable(words: Iterable[str]) -> str:
    return "_".join(words).upper().replace("-", "_")


def _parse_flag(name: str, text: str) -> bool:
    try:
        return _FLAG_WORDS[text.strip().lower()]
    except KeyError:
        raise UsageError(
            f"{name}={text!r} is neither true nor false", "Write 1 or 0, or unset it."
        ) from None


def _scalars(values: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Lists become comma lists, as on the command line."""
    scalars = {}
    for key, value in values.items():
        items = value if isinstance(value, list) else [value]
        if not items or not all(isinstance(item, str | int | float) for item in items):
            raise BadFileError(
                f"{source}: {key} = {value!r} is not a setting",
                "Write a text, a number, true, false, or a list of texts or numbers.",
            )
        scalars[key] = ",".join(map(str, value)) if isinstance(value, list) else value
    return scalars


def _check_keys(table: Mapping[str, Any], known: Iterable[str], kind: str, source: Path) -> None:
    known = sorted(known)
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise BadFileError(
                f"{source}: {key!r} is no {kind}",
                f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}.",
            )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadFileError(
            f"{path} cannot be read: {error.strerror or error}",
            "Name an existing configuration file with --config or MOEJAX_CONFIG.",
        ) from error
    except (ValueError, RecursionError) as error:
        raise BadFileError(
            f"{path} is not TOML: {error}", "Mend the line that it names."
        ) from error
