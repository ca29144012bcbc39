"""Faults of this machine that look like faults of a server.

Reports: NousResearch/hermes-agent#9946 (a pasted key with characters that no header can hold),
Aider-AI/aider#3710 (certificates that are gone).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("variable", "value", "endpoint", "named"),
    [
        ("HF_TOKEN", "“hf_abc”", "http://127.0.0.1:9", "token contains '“'"),
        ("SSL_CERT_FILE", "/gone/ca.pem", "https://127.0.0.1:9", "SSL_CERT_FILE"),
        ("ALL_PROXY", "socks5://127.0.0.1:9", "http://127.0.0.2:9", "SOCKS proxy"),
    ],
)
def test_the_fault_is_named_where_it_lies(
    tmp_path: Path, variable: str, value: str, endpoint: str, named: str
) -> None:
    environment = {**os.environ, "MLX_SORA_WEIGHTS": str(tmp_path), variable: value}
    environment = {k: v for k, v in environment.items() if k.lower() != "no_proxy"}
    child = subprocess.run(
        [sys.executable, "-m", "mlx_sora", "download", "opensora-1.2", "--endpoint", endpoint],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 4
    assert child.stderr.count("\n") == 1
    assert named in child.stderr
