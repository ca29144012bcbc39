"""`generate --dry-run --ranks N` estimates a step on several machines."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mlx_sora import GenerationRequest, Pipeline
from mlx_sora.cli.main import build_parser, main
from mlx_sora.cli.ranks import estimate_on_cluster
from mlx_sora.distributed.cost_model import LINKS, Chip, Cluster, chips

WORDS = ["generate", "-p", "a cat", "--model", "shapes", "--seed", "1", "--dry-run"]


def test_every_parallel_mode_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "--ranks", "4", "--link", "10gbe", "--chip", "m4-pro"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("estimated, not measured"))
    assert "M4 Pro, 10gbe" in lines[start]
    rows = [line.split()[:2] for line in lines[start + 2 :]]
    assert rows[0] == ["1", "off"]
    assert sorted(rows[1:]) == [["4", "both"], ["4", "sequence"]]


def test_estimates_as_json_use_measured_figures(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--ranks", "2", "--link", "1GB/s,0ms", "--chip", "0.001TFLOPS", "--json-events"]
    assert main([*WORDS, "--sampler", "midpoint", *flags]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    single, best = line["ways"][:2]
    assert (single["ranks"], best["ranks"], best["parallel"]) == (1, 2, "guidance")
    compute = best["seconds_per_step"] * (1 - best["share_of_exchange"])
    assert compute == pytest.approx(single["seconds_per_step"] / 2)
    exchange = best["seconds_per_step"] - compute
    assert exchange == pytest.approx(best["bytes_sent_per_step"] / 1e9)


def test_quantized_weights_shorten_the_step() -> None:
    pipeline = Pipeline.from_pretrained("shapes")
    cluster = Cluster(2, Chip("slow memory", float("inf"), 1e9), LINKS[0])
    request = GenerationRequest(prompt="a cat", num_frames=1)
    plain, small = (
        estimate_on_cluster(pipeline, replace(request, quantize=bits), cluster)[0]
        for bits in (None, 8)
    )
    assert small.seconds < plain.seconds


def test_a_step_over_windows_evaluates_each() -> None:
    pipeline, cluster = (
        Pipeline.from_pretrained("shapes"),
        Cluster(2, next(iter(chips().values())), LINKS[0]),
    )
    request = GenerationRequest(prompt="a cat", num_frames=34)
    one, three = (
        estimate_on_cluster(pipeline, each, cluster)[0]
        for each in (request, replace(request, loop=3, long="windows"))
    )
    assert three.seconds == pytest.approx(3 * one.seconds)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--ranks", "0"], "--ranks 0 is out of range."),
        (["--link", "wifi"], "--link needs --ranks."),
        (["--ranks", "2", "--link", "usb"], "Unknown link 'usb'."),
        (["--ranks", "2", "--chip", "m0"], "Unknown chip 'm0'."),
    ],
)
def test_wrong_cluster_flags_are_refused(
    flags: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*WORDS, *flags]) == 2
    assert line in capsys.readouterr().err


def test_ranks_without_dry_run_names_mlx_launch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS[:-1], "--ranks", "2"]) == 2
    assert "mlx.launch --hostfile FILE" in capsys.readouterr().err


def test_help_names_all_links_and_chips(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["generate", "--help-all"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(name in text for name in [*(link.name for link in LINKS), *chips()])
