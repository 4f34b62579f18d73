"""Writes a hardware profile as the TOML that people read and edit."""

import json

from moejax.cards import Hardware


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
        lines += ["", f"[constants.{name}]", f"value = {_number(constant.value)}"]
        lines += [f"unit = {_quoted(constant.unit)}", f"kind = {_quoted(constant.kind)}"]
        if constant.standard_error is not None:
            lines.append(f"standard_error = {_number(constant.standard_error)}")
        lines.append(f"source = {_quoted(constant.source)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    # JSON strings without escaped slashes are valid TOML basic strings.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _number(value: float) -> str:
    # TOML wants a digit on both sides of the point and a point before the exponent is optional.
    return repr(float(value))
