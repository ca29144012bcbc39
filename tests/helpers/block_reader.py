"""Readers that watch a loader at work, and the text encoder to try them on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from mlx_sora.loading.blocks import BlockSource
from mlx_sora.loading.model_folder import ModelFolder
from mlx_sora.loading.networks import stream_text_encoder
from mlx_sora.loading.safetensors import TensorInfo, load_tensors
from mlx_sora.models.t5 import T5Block, T5Encoder


class Log:
    """A reader that notes which blocks are read, and by which thread."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.blocks: list[int] = []
        self.threads: set[str] = set()
        self.seconds = seconds
        self.last: tuple[int, Path] | None = None

    def __call__(
        self, file: Path, tensors: Mapping[str, TensorInfo], stream: mx.Stream | None
    ) -> dict[str, mx.array]:
        time.sleep(self.seconds)
        block = int(next(iter(tensors)).split(".")[2])
        # One block lies across the border of two files.
        if (block, file) == self.last or block not in self.blocks[-1:]:
            self.blocks.append(block)
        self.last = block, file
        self.threads.add(threading.current_thread().name)
        return load_tensors(file, tensors, stream)


def loaders() -> int:
    return sum(thread.name.startswith("load ") for thread in threading.enumerate())


@contextmanager
def no_loader_left() -> Iterator[None]:
    assert loaders() == 0
    yield
    assert loaders() == 0


def t5(
    model: ModelFolder, reader: Log | None = None
) -> tuple[T5Encoder, BlockSource[T5Block], Log]:
    network, _, source = stream_text_encoder(model, mx.float32)
    reader = reader or Log()
    return network, replace(source, reader=reader), reader
