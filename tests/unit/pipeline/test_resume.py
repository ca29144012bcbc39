"""Whose checkpoint it is: the same command goes on, another is told in a line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_sora import GenerationRequest, Pipeline, UsageError, WeightsError
from mlx_sora.distributed.group import Ranks
from mlx_sora.errors import MlxSoraError
from mlx_sora.loading.model_folder import ModelFolder, find_model
from mlx_sora.pipeline.checkpoint import Snapshot
from mlx_sora.pipeline.resume import continue_checkpoint, continue_on_ranks, resumed_request
from mlx_sora.runtime.device import default_dtype
from mlx_sora.runtime.events import (
    Event,
    Finished,
    Noted,
    StageFinished,
    StageStarted,
    StepFinished,
    Warned,
)
from mlx_sora.video.output_path import checkpoint_path
from tests.helpers.dates import set_today

OPTIONS = {"prompt": "a red circle", "seed": 3, "steps": 3, "num_frames": 17}
OPTIONS |= {"width": 32, "height": 32, "checkpoint_every": 2}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "a.webp"


def request(output: Path, **more: Any) -> GenerationRequest:
    return GenerationRequest.from_dict({**OPTIONS, "output": str(output), **more})


def stop(pipe: Pipeline, asked: GenerationRequest, steps: int) -> None:
    """Make `steps` steps and walk away."""
    run = pipe.stream(asked)
    for event in run:
        if isinstance(event, StepFinished) and event.step + 1 == steps:
            break
    run.close()


def finish(events: Any) -> tuple[list[Event], Path]:
    seen = list(events)
    assert isinstance(seen[-1], Finished)
    assert seen[-1].video.path is not None
    return seen, seen[-1].video.path


def stages(seen: list[Event]) -> list[str]:
    return [event.stage for event in seen if isinstance(event, StageStarted)]


def notes(seen: list[Event]) -> str:
    return "\n".join(event.message for event in seen if isinstance(event, (Noted, Warned)))


def test_whoever_stops_listening_loses_no_step(pipe: Pipeline, output: Path) -> None:
    stop(pipe, request(output), 1)
    found = Snapshot.load(checkpoint_path(output))
    assert (found.clip, found.steps) == (0, 1)
    assert [file.name for file in output.parent.iterdir()] == [checkpoint_path(output).name]
    seen, _ = finish(pipe.stream(request(output)))
    assert "1 of 3 steps are done" in notes(seen)
    assert [file.name for file in output.parent.iterdir()] == [output.name]


def test_without_the_option_nothing_is_kept(pipe: Pipeline, output: Path) -> None:
    stop(pipe, request(output, checkpoint_every=None), 2)
    assert list(output.parent.iterdir()) == []


def test_an_error_in_a_step_keeps_those_before(
    pipe: Pipeline, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def watch(self: object, result: Any) -> None:
        if result.step.index == 1:
            raise ValueError("broken")

    with monkeypatch.context() as patch:
        patch.setattr("mlx_sora.accel.Accelerations.on_step_end", watch)
        with pytest.raises(ValueError, match="broken"):
            finish(pipe.stream(request(output)))
    assert Snapshot.load(checkpoint_path(output)).steps == 1


def test_a_death_while_decoding_needs_no_other_stage(pipe: Pipeline, output: Path) -> None:
    _, once = finish(pipe.stream(request(output.with_name("once.webp"), checkpoint_every=None)))
    run = pipe.stream(request(output))
    assert any(isinstance(e, StageStarted) and e.stage == "decode" for e in run)
    run.close()
    seen, path = finish(pipe.stream(request(output)))
    assert stages(seen) == ["decode"]
    assert "all steps are done" in notes(seen)
    assert np.array_equal(read_frames(path), read_frames(once))


def read_frames(path: Path) -> np.ndarray:
    from PIL import Image, ImageSequence

    with Image.open(path) as image:
        return np.stack([np.array(frame) for frame in ImageSequence.Iterator(image)])


def test_the_file_alone_is_enough(pipe: Pipeline, output: Path, tmp_path: Path) -> None:
    asked = request(output, preset="fast", loop=2, num_frames=34, embed_metadata=False)
    stop(pipe, asked, 2)
    elsewhere = tmp_path / "new"
    elsewhere.mkdir()
    moved = shutil.move(checkpoint_path(output), elsewhere / "renamed.safetensors")
    made = pipe.resume(moved, output=str(elsewhere / "b.webp"), memory_budget="2GB")
    assert made.metadata["resumed"] == [{"clip": 0, "step": 2}]
    assert made.metadata["request"]["preset"] == "fast"
    pipe(**asked.to_dict())
    assert (elsewhere / "b.webp").read_bytes() == output.read_bytes()
    assert sorted(file.name for file in elsewhere.iterdir()) == ["b.webp", "renamed.safetensors"]


def test_a_video_lies_beside_its_checkpoint(pipe: Pipeline, output: Path) -> None:
    odd = output.with_name("{odd} name.webp")
    stop(pipe, request(odd.with_name("{{odd}} name.webp")), 1)
    assert pipe.resume(checkpoint_path(odd)).path == odd


def test_options_that_would_change_the_video_are_refused_by_name(
    pipe: Pipeline, output: Path
) -> None:
    stop(pipe, request(output), 1)
    file = checkpoint_path(output)
    for name, value in (("steps", 1), ("seed", 1), ("lpl", "fixed:1")):
        with pytest.raises(UsageError, match=f"--{name} cannot be changed"):
            resumed_request(file, {name: value})
    assert resumed_request(file, {"ci_dl": True}).ci_dl


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": 4}, "steps was 3, now 4"),
        ({"seed": 4}, "seed was 3, now 4"),
        ({"prompt": "a blue circle"}, "the prompt was"),
        ({"sequential_guidance": True}, "sequential_guidance was"),
        ({"width": 64}, "width"),
        ({"step_cache": "every:2,warmup=1"}, "step_cache"),
    ],
    ids=str,
)
def test_another_request_is_told_and_clobbers_nothing(
    pipe: Pipeline, output: Path, change: dict[str, Any], says: str
) -> None:
    stop(pipe, request(output), 1)
    before = checkpoint_path(output).read_bytes()
    with pytest.raises(UsageError, match=says):
        pipe.stream(request(output, **change))
    assert checkpoint_path(output).read_bytes() == before


def test_overwrite_replaces_the_checkpoint_of_another_request(pipe: Pipeline, output: Path) -> None:
    stop(pipe, request(output), 1)
    seen, _ = finish(pipe.stream(request(output, steps=2, overwrite=True)))
    assert "It will be replaced" in notes(seen)
    assert not checkpoint_path(output).exists()


def test_what_changes_nothing_may_change(pipe: Pipeline, output: Path) -> None:
    stop(pipe, request(output), 1)
    dtype = str(default_dtype()).removeprefix("mlx.core.")
    asked = request(output, checkpoint_every=1, ci_dl=True, steps=3, dtype=dtype, fps=24)
    assert "1 of 3 steps" in notes(finish(pipe.stream(asked))[0])


@pytest.fixture
def copy(tmp_path: Path) -> ModelFolder:
    """A model folder of this test alone."""
    return ModelFolder.open(shutil.copytree(find_model("shapes").path, tmp_path / "shapes"))


def change(model: ModelFolder) -> None:
    """Replace the transformer by one of which the last byte is another."""
    weights = model.transformer / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_other_weights_are_refused(pipe: Pipeline, output: Path, copy: ModelFolder) -> None:
    stop(pipe, request(output), 1)
    Pipeline(copy).stream(request(output)).close()
    change(copy)
    with pytest.raises(WeightsError, match="other weights"):
        Pipeline(copy).stream(request(output))


def test_weights_that_are_replaced_during_a_run_end_it(output: Path, copy: ModelFolder) -> None:
    run = Pipeline(copy).stream(request(output, checkpoint_every=1))
    while not (isinstance(event := next(run), StageFinished) and event.stage == "encode"):
        pass
    change(copy)
    with pytest.raises(WeightsError, match="were replaced during the run.*delete the checkpoint"):
        next(event for event in run if isinstance(event, StepFinished))
    assert not output.exists()


def test_a_checkpoint_that_compared_a_sample_of_the_weights_is_refused(
    pipe: Pipeline, output: Path
) -> None:
    stop(pipe, request(output), 1)
    found = Snapshot.load(checkpoint_path(output))
    old = replace(found, identity={**found.identity, "weights": "0" * 64})
    old.save(checkpoint_path(output))
    with pytest.raises(WeightsError, match="earlier version.*Go on with that version"):
        pipe.stream(request(output))
    finish(pipe.stream(request(output, overwrite=True)))


def test_given_pictures_must_be_the_same(pipe: Pipeline, output: Path, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "in").mkdir()
    picture = tmp_path / "in" / "p.png"
    Image.new("RGB", (32, 32), "red").save(picture)
    asked = request(output, images=[str(picture)])
    stop(pipe, asked, 1)
    Image.new("RGB", (32, 32), "blue").save(picture)
    with pytest.raises(UsageError, match="media"):
        pipe.stream(asked)


def test_a_damaged_checkpoint_is_a_line(pipe: Pipeline, output: Path) -> None:
    stop(pipe, request(output), 1)
    file = checkpoint_path(output)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(WeightsError, match="damaged.*Delete it"):
        pipe.stream(request(output))


def test_a_checkpoint_needs_an_output(pipe: Pipeline) -> None:
    with pytest.raises(UsageError, match="output"):
        pipe.stream(GenerationRequest.from_dict(OPTIONS))


def test_a_full_disk_costs_the_checkpoint_not_the_video(
    pipe: Pipeline, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(self: Snapshot, path: Path) -> None:
        raise MlxSoraError(f"Cannot write {path}: No space left.", "Is the disk full?")

    monkeypatch.setattr(Snapshot, "save", save)
    seen, path = finish(pipe.stream(request(output, checkpoint_every=1)))
    assert sum(e.message.count("No space left") for e in seen if isinstance(e, Warned)) == 1
    assert path.exists()


def names(asked: GenerationRequest) -> dict[str, object]:
    """What a template is filled with."""
    return {"prompt_slug": "a-red-circle", "seed": asked.seed}


class TestSeeds:
    """A seed that was drawn is that of the checkpoint, when the same request comes again."""

    @pytest.fixture
    def drawn(self, pipe: Pipeline, tmp_path: Path) -> Callable[..., GenerationRequest]:
        def ask(**more: Any) -> GenerationRequest:
            return request(tmp_path / "{prompt_slug}-{seed}", **{"seed": None, **more})

        return ask

    def test_it_is_found_again(
        self, pipe: Pipeline, drawn: Callable[..., GenerationRequest]
    ) -> None:
        first = drawn().with_seed()
        stop(pipe, first, 1)
        assert continue_checkpoint(drawn()).seed == first.seed
        assert continue_checkpoint(drawn(seed=5)).seed == 5
        assert continue_checkpoint(drawn(steps=4)).seed != first.seed
        assert continue_checkpoint(drawn(checkpoint_every=None)).seed != first.seed
        seen, path = finish(pipe.stream(drawn()))
        assert str(first.seed) in path.name
        assert "1 of 3 steps" in notes(seen)

    def test_a_checkpoint_of_an_enhanced_prompt_is_found_by_the_typed_one(
        self, pipe: Pipeline, tmp_path: Path
    ) -> None:
        typed = request(tmp_path / "a.mp4", seed=None)
        changed = {"prompt": f"{typed.prompt}. The scene", "original_prompt": typed.prompt}
        first = request(tmp_path / "a.mp4", **changed, seed=8)
        stop(pipe, first, 1)
        assert continue_checkpoint(typed, enhance=True).seed == 8
        assert continue_checkpoint(replace(first, seed=None), enhance=True).seed == 8
        assert continue_checkpoint(typed).seed != 8

    def test_what_another_run_is_at_work_on_is_left_alone(
        self, pipe: Pipeline, drawn: Callable[..., GenerationRequest]
    ) -> None:
        first = drawn().with_seed()
        run = pipe.stream(first)
        assert any(isinstance(e, StepFinished) and e.step == 1 for e in run)
        assert checkpoint_path(Path(str(first.output).format(**names(first)) + ".mp4")).exists()
        assert continue_checkpoint(drawn()).seed != first.seed
        run.close()
        assert continue_checkpoint(drawn()).seed == first.seed

    def test_another_day_goes_on_with_the_file_of_the_first(
        self, pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        template = tmp_path / "{date}" / "{model}-{date}-{seed}"
        set_today(monkeypatch, "2026-01-31")
        first = request(template, seed=None).with_seed()
        stop(pipe, first, 1)
        set_today(monkeypatch, "2026-02-01")
        other, path = finish(pipe.stream(request(template, seed=None, steps=2)))
        assert path.parent.name == "2026-02-01"
        assert "steps are done" not in notes(other)
        seen, path = finish(pipe.stream(request(template, seed=None)))
        assert path == tmp_path / f"2026-01-31/shapes-2026-01-31-{first.seed}.mp4"
        assert "1 of 3 steps" in notes(seen)

    def test_other_ranks_go_on_with_what_rank_0_found(
        self, pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        drawn = request(tmp_path / "{date}-{seed}", seed=None)
        set_today(monkeypatch, "2026-01-31")
        stop(pipe, drawn.with_seed(7), 1)
        set_today(monkeypatch, "2026-02-01")
        sent = list[Any]()

        class Rank0(Ranks):
            def broadcast_object(self, value: Any) -> Any:
                sent.append(value)
                return value

        class Rank1(Ranks):
            def broadcast_object(self, value: Any) -> Any:
                return sent[0]

        first = continue_on_ranks(drawn, Rank0(), "shapes")
        for file in tmp_path.iterdir():  # which another machine does not have
            file.unlink()
        assert continue_on_ranks(drawn, Rank1(), "shapes") == first
        assert first.output == str(tmp_path / "2026-01-31-{seed}")

    def test_damaged_and_foreign_files_are_passed_over(
        self, pipe: Pipeline, drawn: Callable[..., GenerationRequest], tmp_path: Path
    ) -> None:
        first = drawn().with_seed()
        stop(pipe, first, 1)
        (tmp_path / "x.checkpoint.safetensors").write_bytes(b"junk")
        (tmp_path / "y.checkpoint.safetensors").mkdir()
        assert continue_checkpoint(drawn()).seed == first.seed

    def test_a_batch_goes_on_with_each(
        self, pipe: Pipeline, drawn: Callable[..., GenerationRequest]
    ) -> None:
        stop(pipe, drawn(prompt="a blue square"), 1)
        stop(pipe, drawn(prompt="a green circle"), 3)
        asked = [drawn(prompt=p) for p in ("a blue square", "a green circle", "a red circle")]
        seen = list(pipe.stream_all(asked))
        made = [e.video.metadata.get("resumed") for e in seen if isinstance(e, Finished)]
        assert made == [[{"clip": 0, "step": 1}], [{"clip": 1, "step": 0}], None]
