"""The date of today, as templates of outputs see it."""

from __future__ import annotations

import datetime
from types import SimpleNamespace

import pytest

from mlx_sora.video import output_template


def set_today(monkeypatch: pytest.MonkeyPatch, day: str) -> None:
    """Let {date} be `day`, such as 2026-01-31."""
    today = SimpleNamespace(today=lambda: datetime.date.fromisoformat(day))
    monkeypatch.setattr(output_template, "datetime", SimpleNamespace(date=today))
