"""From a request to a video: one module for each step."""

from mlx_sora.pipeline.pipeline import Pipeline

__all__ = ["Pipeline"]
