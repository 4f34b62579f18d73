"""Writes a hardware profile as the TOML that people read and edit."""

import json

from moejax.cards import Constant, Hardware, Uncertainty


def format_profile(hardware: Hardware, *, header: str = "") -> str:
    """A hardware profile as TOML text, constants in their order; the inverse of loading one.

    Args:
      hardware: The profile.
      header: Comment for the top of the file, without comment signs.
    """
    lines = [f"# {line}".rstrip() for line in header.splitlines()]
    for key in ("name", "title", "source", "note"):
        text = getattr(hardware, key)
        if text:
            lines.append(f"{key} = {_quoted(text)}")
    for name, constant in hardware.constants.items():
        lines += _constant_lines(f"constants.{name}", constant)
    for name, constant in hardware.strategy_layer_s.items():
        lines += _constant_lines(f"strategy_layer_s.{name}", constant)
    if hardware.uncertainty is not None:
        lines += _uncertainty_lines(hardware.uncertainty)
    return "\n".join(lines) + "\n"


def _constant_lines(table: str, constant: Constant) -> list[str]:
    lines = ["", f"[{table}]", f"value = {_number(constant.value)}"]
    lines += [f"unit = {_quoted(constant.unit)}", f"kind = {_quoted(constant.kind)}"]
    if constant.standard_error is not None:
        lines.append(f"standard_error = {_number(constant.standard_error)}")
    return [*lines, f"source = {_quoted(constant.source)}"]


def _uncertainty_lines(uncertainty: Uncertainty) -> list[str]:
    rows = [
        "  [" + ", ".join(f"{value:.6f}" for value in row) + "],"
        for row in uncertainty.correlations
    ]
    return [
        "",
        "# Of log(measured / predicted) over cases; correlations are those of the constants' logs.",
        "[uncertainty]",
        f"spread_ratio = {_number(uncertainty.spread_ratio)}",
        f"num_degrees = {uncertainty.num_degrees}",
        f"names = [{', '.join(map(_quoted, uncertainty.names))}]",
        *(["correlations = [", *rows, "]"] if rows else ["correlations = []"]),
    ]


def _quoted(text: str) -> str:
    # JSON strings without escaped slashes are valid TOML basic strings.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _number(value: float) -> str:
    # TOML wants a digit on both sides of the point and a point before the exponent is optional.
    return repr(float(value))
