"""The type names that signatures share."""

from typing import TypeAlias

from jaxtyping import Array, Key, UInt32

PRNGKey: TypeAlias = Key[Array, ""] | UInt32[Array, "2"]
"""A typed key or a raw one; a function that takes a key consumes it."""

Scalar: TypeAlias = "float | Array"
