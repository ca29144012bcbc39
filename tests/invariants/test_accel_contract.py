"""Contract of accelerations: off is exact; on is deterministic, composable and recorded.

These tests cover a new technique once EXAMPLES lists its modes.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from mlx_sora import GenerationRequest, Lpl, Pipeline, Tdtm, Video
from mlx_sora.request.generation import options, technique_names
from mlx_sora.request.techniques import OFF
from mlx_sora.runtime.events import Event, Finished, Noted, StageFinished, StepFinished
from mlx_sora.video.metadata import read_metadata, replay_options
from tests.helpers.resume import check_resumes

#: Modes of each technique to run with, in STEPS steps; the first also in pairs.
EXAMPLES = {
    "lpl": ("fixed:2", "fixed:2,order=1", "t:500", "adaptive:patience=1,tolerance=2", "reference"),
    "tdtm": ("2", "all", "last:2,sites=cross+temporal-kv", "between:0,800,sites=mlp+spatial-kv"),
    "step_cache": ("every:2,warmup=1", "every:2,warmup=2,order=1", "online:warmup=2,threshold=9"),
    "guidance_interval": ("30,900",),
    "guidance_cache": ("every:3,after=0.2", "every:2,after=0,boost=1.2"),
}
STEPS = 5
SMALL = {"prompt": "a red circle", "seed": 3, "steps": STEPS, "num_frames": 17}
SMALL |= {"width": 32, "height": 32}

EACH = [(name, mode) for name, modes in EXAMPLES.items() for mode in modes]
PAIRS = [{a: EXAMPLES[a][0], b: EXAMPLES[b][0]} for a, b in combinations(EXAMPLES, 2)]


@pytest.fixture(scope="module")
def exact(pipe: Pipeline) -> list[bytes]:
    return latents(pipe)


def latents(pipe: Pipeline, **modes: object) -> list[bytes]:
    """Return the latents after each step."""
    run = pipe.stream(GenerationRequest.from_dict({**SMALL, **modes}))
    found = []
    for event in run:
        if isinstance(event, StepFinished):
            found.append(np.array(event.latents).tobytes())
        if isinstance(event, StageFinished) and event.stage == "denoise":
            break
    run.close()
    return found


def finished(pipe: Pipeline, **modes: object) -> list[Event]:
    return list(pipe.stream(GenerationRequest.from_dict({**SMALL, **modes})))


def video(run: list[Event]) -> Video:
    last = run[-1]
    assert isinstance(last, Finished)
    return last.video


def test_examples_cover_every_technique() -> None:
    assert EXAMPLES.keys() == set(technique_names())


@pytest.mark.parametrize("name", technique_names())
def test_off_is_exact(pipe: Pipeline, exact: list[bytes], name: str) -> None:
    assert latents(pipe, **{name: OFF}) == exact


def test_off_is_recorded_as_off(pipe: Pipeline) -> None:
    all_off = dict.fromkeys(technique_names(), OFF)
    plain, off = video(finished(pipe)), video(finished(pipe, **all_off))
    assert np.array_equal(plain.frames, off.frames)
    for made in (plain, off):
        assert made.metadata["accelerations"] == {}
        assert all(made.metadata["settings"][name] == OFF for name in technique_names())


@pytest.mark.parametrize(("name", "mode"), EACH)
def test_on_is_deterministic_and_keeps_no_state(
    pipe: Pipeline, exact: list[bytes], name: str, mode: str
) -> None:
    first = latents(pipe, **{name: mode})
    assert latents(Pipeline.from_pretrained("shapes"), **{name: mode}) == first
    assert latents(pipe) == exact


@pytest.mark.parametrize(("name", "mode"), EACH)
def test_on_is_recorded(pipe: Pipeline, name: str, mode: str) -> None:
    run = finished(pipe, **{name: mode})
    record = video(run).metadata
    assert list(record["accelerations"]) == [name]
    assert record["settings"][name] == str(options()[name].parse(mode))
    notes = [event.message for event in run if isinstance(event, Noted)]
    assert [note.split(":")[0] for note in notes] == [name]


@pytest.mark.parametrize(("name", "mode"), EACH)
def test_interrupted_run_continues_exactly(
    pipe: Pipeline, tmp_path: Path, name: str, mode: str
) -> None:
    check_resumes(pipe, tmp_path, {**SMALL, name: mode}, after=(1, 2), decode=False)


def test_all_techniques_together_continue_exactly(pipe: Pipeline, tmp_path: Path) -> None:
    """The file and the account are the same, byte for byte."""
    modes = {name: modes[0] for name, modes in EXAMPLES.items()}
    modes |= {"lpl": "adaptive:patience=2,tolerance=2", "sampler": "ab2"}
    more = {"steps": 7, "sequential_guidance": True, "ci_dl": True}
    whole = check_resumes(pipe, tmp_path, {**SMALL, **modes, **more}, after=(1, 3, 6), decode=True)
    assert whole.record["accelerations"].keys() >= set(technique_names())
    assert whole.record["accelerations"]["lpl"]["leapt"]
    assert len(whole.latents) == 6


@pytest.mark.parametrize("modes", PAIRS, ids=str)
def test_pairs_compose(pipe: Pipeline, exact: list[bytes], modes: Mapping[str, str]) -> None:
    together = latents(pipe, **modes)
    assert latents(pipe, **dict(reversed(modes.items()))) == together
    for name in modes:
        others = {key: mode for key, mode in modes.items() if key != name}
        if latents(pipe, **{name: modes[name]}) != exact:
            assert latents(pipe, **others) != together, f"{name} has no effect in {modes}"


def test_leap_changes_no_earlier_step(pipe: Pipeline) -> None:
    """A leap after merged steps: the same bits as merging alone up to the leap."""
    merging, both = latents(pipe, tdtm="1"), latents(pipe, tdtm="1", lpl="fixed:3")
    assert len(both) == 4
    assert both[:3] == merging[:3]
    assert both[3] != merging[3]


def test_metadata_has_the_account(pipe: Pipeline) -> None:
    run = finished(pipe, lpl=Lpl(after=2), tdtm=Tdtm())
    t = [event.t for event in run if isinstance(event, StepFinished)][-1]
    assert video(run).metadata["accelerations"] == {
        "lpl": {
            "leapt": True,
            "after_steps": 2,
            "t": round(t, 3),
            "evaluations_saved": STEPS - 3,
        },
        "tdtm": {"merged_steps": 3, "frames": 5, "attending": 2},
    }


def test_replay_uses_the_same_accelerations(pipe: Pipeline, tmp_path: Path) -> None:
    modes = {"lpl": "adaptive:patience=1,tolerance=2", "tdtm": 2}
    made = pipe(**{**SMALL, **modes}, output=str(tmp_path / "a.mp4"))  # type: ignore[arg-type]
    options = replay_options(read_metadata(tmp_path / "a.mp4")) | {"model": None}
    assert options["lpl"] == "adaptive:patience=1,tolerance=2,minimum=0.5"
    again = video(finished(pipe, **options))
    assert again.metadata["accelerations"] == made.metadata["accelerations"]
    assert np.array_equal(again.frames, video(finished(pipe, **modes)).frames)


def test_step_without_blocks_reads_no_block(pipe: Pipeline) -> None:
    modes = {"step_cache": "every:3,warmup=1", "guidance_cache": "every:2,after=0"}
    resident = latents(pipe, **modes)
    assert latents(pipe, **modes, ci_dl=True) == resident
    depth = pipe.model.config("transformer")["depth"]
    read = {}
    for name, more in (("exact", {}), ("cached", modes)):
        record = video(finished(pipe, **more, ci_dl=True)).metadata["accelerations"]
        read[name] = record["ci_dl"]["denoise"]
    assert (read["exact"]["loads"], read["cached"]["loads"]) == (STEPS * depth, 2 * depth)
    assert read["cached"]["bytes_read"] / read["exact"]["bytes_read"] == 2 / STEPS


@pytest.mark.parametrize("sampler", ["midpoint", "ab2"])
def test_caches_work_with_samplers_and_sequential_guidance(pipe: Pipeline, sampler: str) -> None:
    modes = {"step_cache": "every:2,warmup=1,order=1", "guidance_cache": "every:2,after=0"}
    common = {**modes, "sampler": sampler, "steps": 3}
    together = video(finished(pipe, **common))
    apart = video(finished(pipe, **common, sequential_guidance=True))
    evaluations = 6 if sampler == "midpoint" else 3
    done = together.metadata["accelerations"]
    assert done["step_cache"]["computed"] == [0, 2]
    assert done["step_cache"]["evaluations"] == evaluations
    assert done["guidance_cache"] == {"guided": evaluations, "halves_saved": evaluations // 3}
    assert apart.metadata["accelerations"] == done
    assert together.frames is not None
    assert apart.frames is not None
    assert abs(together.frames.astype(int) - apart.frames).max() <= 1


def test_step_cache_saves_without_guidance(pipe: Pipeline) -> None:
    made = video(finished(pipe, step_cache="every:2,warmup=1", guidance=1))
    assert made.metadata["accelerations"]["step_cache"]["evaluations_saved"] == 2


def test_step_cache_runs_blocks_for_fresh_frames(pipe: Pipeline, tmp_path: Path) -> None:
    """An image with a strength below 1 starts in a later step, which runs the blocks."""
    from PIL import Image

    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    given = {"images": [[str(tmp_path / "a.png"), 0, 0.9]], "step_cache": "every:9,warmup=1"}
    made = video(finished(pipe, **given))
    computed = made.metadata["accelerations"]["step_cache"]["computed"]
    assert computed[0] == 0
    assert len(computed) == 2
