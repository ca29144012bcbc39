"""`generate --dry-run --ranks N` foretells a step on machines that are not there."""

from __future__ import annotations

import json

import pytest

from mlx_sora import GenerationRequest, Pipeline
from mlx_sora.cli.forecast import Cluster, foretold
from mlx_sora.cli.main import build_parser, main
from mlx_sora.distributed.cost_model import LINKS, Chip, chips

WORDS = ["generate", "-p", "a cat", "--model", "shapes", "--seed", "1", "--dry-run"]


def test_every_way_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "--ranks", "4", "--link", "10gbe", "--chip", "m4-pro"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("foretold, not measured"))
    assert "M4 Pro, 10gbe" in lines[start]
    rows = [line.split()[:2] for line in lines[start + 2 :]]
    assert rows[0] == ["1", "off"]
    assert sorted(rows[1:]) == [["4", "both"], ["4", "sequence"]]


def test_as_json_with_measured_figures(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--ranks", "2", "--link", "1GB/s,0ms", "--chip", "0.001TFLOPS", "--json-events"]
    assert main([*WORDS, "--sampler", "midpoint", *flags]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    alone, best = told["ways"][:2]
    assert (alone["ranks"], best["ranks"], best["parallel"]) == (1, 2, "guidance")
    computing = best["seconds_per_step"] * (1 - best["share_of_exchange"])
    assert computing == pytest.approx(alone["seconds_per_step"] / 2)
    exchanging = best["seconds_per_step"] - computing
    assert exchanging == pytest.approx(best["bytes_sent_per_step"] / 1e9)


def test_quantized_weights_are_read_sooner() -> None:
    pipeline = Pipeline.from_pretrained("shapes")
    cluster = Cluster(2, LINKS[0], Chip("slow memory", float("inf"), 1e9))
    plain, small = (
        foretold(pipeline, GenerationRequest(prompt="a cat", num_frames=1, quantize=bits), cluster)
        for bits in (None, 8)
    )
    assert small[0].seconds < plain[0].seconds


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--ranks", "0"], "--ranks 0 is no number of machines."),
        (["--link", "wifi"], "--ranks None is no number of machines."),
        (["--ranks", "2", "--link", "usb"], "Unknown link 'usb'."),
        (["--ranks", "2", "--chip", "m0"], "Unknown chip 'm0'."),
    ],
)
def test_what_cannot_be_foretold(
    flags: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*WORDS, *flags]) == 2
    assert line in capsys.readouterr().err


def test_without_dry_run_the_way_to_start_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS[:-1], "--ranks", "2"]) == 2
    assert "mlx.launch --hostfile FILE" in capsys.readouterr().err


def test_the_help_names_all_links_and_chips(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["generate", "--help-all"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(name in text for name in [*(link.name for link in LINKS), *chips()])
