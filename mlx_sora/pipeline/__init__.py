"""Prompt in, video out: the road of a request, one page for each part of it."""

from mlx_sora.pipeline.pipeline import Pipeline

__all__ = ["Pipeline"]
