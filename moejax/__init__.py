"""moejax: which experts of a mixture-of-experts model to keep on the GPU, and what that buys."""

__version__ = "0.1.0"
