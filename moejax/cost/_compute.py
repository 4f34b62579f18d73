"""How long the device computes: a smooth roofline that gradients can cross.

    t = smooth_maximum(n_experts x bytes / (efficiency x VRAM bandwidth), n_tokens x FLOPs / peak)
    smooth_maximum(a, b) = (a^p + b^p)^(1/p),  p = 8

At the ridge, where both terms are equal, p = 8 lies 9 % above the sharp maximum; a factor of two
away from it less than 0.1 %.
"""

import jax.numpy as jnp

from moejax._types import Scalar

_SHARPNESS = 8.0


def smooth_maximum(a_s: Scalar, b_s: Scalar) -> Scalar:
    """p-norm of two non-negative times: smooth, never below either, exactly 0 when both are."""
    high_s = jnp.maximum(a_s, b_s)
    # Dividing by the larger keeps powers in [0, 1]; the inner `where` keeps 0/0 out of gradients.
    ratio = jnp.minimum(a_s, b_s) / jnp.where(high_s > 0, high_s, 1.0)
    return high_s * (1.0 + ratio**_SHARPNESS) ** (1.0 / _SHARPNESS)


def expert_compute_s(
    read_s: Scalar, token_s: Scalar, num_experts: Scalar, num_tokens: Scalar
) -> Scalar:
    """Time to apply `num_experts` experts to `num_tokens` (token, expert) pairs.

    Args:
      read_s: Time to stream the weights of one expert from device memory.
      token_s: FLOP time of one (token, expert) pair.
      num_experts: Experts that are read, each once; may be fractional.
      num_tokens: (token, expert) pairs over all of them.

    Returns:
      The smooth maximum of both times; exactly 0 for 0 experts, where its slope is `read_s`.
    """
    read_all_s = num_experts * read_s
    busy_s = smooth_maximum(read_all_s, num_tokens * token_s)
    return jnp.where(num_experts > 0, busy_s, read_all_s)
