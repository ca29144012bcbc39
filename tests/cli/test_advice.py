"""Advice, typed as it is printed, works; a new one needs a case here."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
import pytest

from mlx_sora.cli import main as cli
from mlx_sora.errors import MlxSoraError
from mlx_sora.loading.model_folder import bundled_folder
from mlx_sora.video.writer import save_frames
from tests.helpers.advice import flags, matches, parse, ways
from tests.invariants.advice import FLAG, templates

PROMPT = "-p 'a red circle moving right on a black background'"
PLAN = f"generate --model m --dry-run {PROMPT}"
EDIT = f"edit v.mp4 --model m --dry-run {PROMPT} --source-prompt 'a red circle grows over black'"
MERGING = f"calibrate --model m -o c.json --overwrite --steps 1 {PROMPT}"
SCENES = "generate --model m --dry-run -p '|0|a|2|b'"


@dataclass(frozen=True)
class Case:
    """A command whose error or warning contains the advice `says`, as `templates` yields it.

    values: of flags that the advice names without one. retry: the command that the advice stands
    for, if its words do not say so. parse: it is not started, only parsed.
    """

    words: str
    says: str
    values: str = ""
    retry: str = ""
    parse: bool = False


CASES = [
    Case(f"{PLAN} --steps 2 --num-frames 1 --step-cache table:1", "make the table: {}"),
    Case(f"{PLAN} --steps 1 --num-frames 17 --tdtm table:1.05", "make the table: {}"),
    Case(f"{MERGING} --motion-check", "Add --tdtm 1.1, or leave it out."),
    Case(f"{MERGING} --tdtm 1.9", "Give --tdtm {} or less."),
    Case(f"{PLAN} --nosuchflag", "See {} --help.", parse=True),
    Case(
        "generate --model m a red circle",
        "Give the prompt so: --prompt {}",
        retry="generate --model m --prompt 'a red circle'",
        parse=True,
    ),
    Case(f"{PLAN} sample.py --verbose 2", "Put text in quotes;", retry=f"{PLAN} --verbose"),
    Case("", "For instance: {} generate --help.", parse=True),
    Case("doctor m --machine", "Leave MODEL and", retry="doctor --machine", parse=True),
    Case("download opensora-1.2 --remove-original", "Add --quantize 8 or 4.", parse=True),
    Case("convert shapes x -q 4 --steps 3", "Add --gptq, or leave it out.", parse=True),
    Case("convert shapes x -q 4 --gptq --distill -1", "Give --distill 600, or", parse=True),
    Case("convert shapes x -q t5=4 --gptq --distill 1", "Add --quantize 4.", parse=True),
    Case("convert shapes x --gptq", "Add --quantize 4 for 4 bits, or leave it out.", parse=True),
    Case(
        "convert shapes x -q mxfp4 --gptq",
        "Give bits, such as --quantize 4, or leave --gptq out.",
        parse=True,
    ),
    Case(f"generate --model m {PROMPT} --chip m4", "Add --dry-run."),
    Case(f"{PLAN} --link wifi", "Add the number of machines: --ranks 2."),
    Case(f"{PLAN} --refine 32x32", "Give --refine {} or more."),
    Case(f"{PLAN} --loop 2", "--num-frames {}"),
    Case(f"{PLAN} --loop 2 --num-frames 34 --condition-frames 34", ", or --condition-frames {}"),
    Case(f"{PLAN} --loop 2 --num-frames 20", "--num-frames {}"),
    Case(f"{PLAN} --loop 2 --num-frames 34 --condition-frames 9", "--condition-frames {}"),
    Case(f"{PLAN} --loop 2 --num-frames 34 --long windows --scene-blend 34", "--scene-blend {}"),
    Case(SCENES, "--loop {}"),
    Case(f"{SCENES} --condition-frames 5", "{} --condition-frames {}"),
    Case(f"{PLAN} --image v.mp4", "Give it to --video.", retry=f"{PLAN} --video v.mp4 --frames 34"),
    Case(f"{PLAN} --video p.png", "Give it to --image.", retry=f"{PLAN} --image p.png"),
    Case(f"{PLAN} --video v.mp4 --num-frames 1", "Use fewer, or raise --num-frames.", "34"),
    Case(f"{PLAN} --parallel both", "Start it as mlx.launch -n 2 -- python -m", retry=PLAN),
    Case("generate --model opensora-1.2 -p a", "python -m mlx_sora download {}", parse=True),
    Case("generate --model opensora-1.2-8bit -p a", " --quantize {}", parse=True),
    Case(f"{PLAN} -p cat", "Its words: python -m mlx_sora info {}.", parse=True),
    Case("generate --model m2 -p a", "Give a name that `python -m", retry="models"),
    Case("convert m full", "Add --overwrite, or name", retry="convert m new"),
    Case(f"{PLAN} --memory-budget 500", "Use --memory-budget {} or more"),
    Case(f"{PLAN} --memory-budget 500 --guidance 1 --width 256 --height 256", "--vae-tiles {}"),
    Case(f"{PLAN} --memory-budget auto --device-profile ipad-8gb", "Give one.", retry=PLAN),
    Case(
        f"{PLAN} --device-profile iphone-15-pro --resolution 720p --num-frames 408",
        "Instead of it use --memory-budget",
        retry=f"{PLAN} --memory-budget 4.3GB --resolution 720p --num-frames 408",
    ),
    Case(
        f"{PLAN} -p -",
        "Use --prompt-file.",
        retry="generate --model m --prompt-file f.txt --dry-run",
    ),
    Case(f"{PLAN} one two", "Put each prompt in quotes,", retry=f"{PLAN} 'one two' 'three four'"),
    Case(
        f"{PLAN} --preview-every 1 --memory-budget 200MB --model other",
        "Leave out --preview-every, set --memory-budget off, or fit a map: ",
        retry=f"{PLAN} --memory-budget 200MB --model other",
    ),
    Case(f"{EDIT} --num-frames 34", "Give --num-frames {} or less."),
    Case(f"edit v.mp4 --model m --dry-run {PROMPT}", "Describe the video: --source-prompt.", "a"),
    Case("generate --model m --dry-run", "Give --prompt TEXT."),
    Case("generate --dry-run -C e.json", "Edit its source again: python -m mlx_sora edit {}"),
    Case("generate -C r.json", "Repeat it with its source:", retry="reconstruct v.mp4 --model m"),
    Case(f"{PLAN} -C images.json", "Give {} again.", "p.png"),
    Case(f"{PLAN} -o .", "Name a file in --output.", "w.mp4"),
    Case(f"{PLAN} -o v.mp4", "Give --overwrite or another --output.", "w.mp4"),
    Case(f"{PLAN} -o v.mp4/w.mp4", "Change --output.", "w.mp4"),
    Case(f"{PLAN} -o link.mp4", "Remove the link, or change --output.", "w.mp4"),
    Case(f"{PLAN} -o w.gif --fps 200", "Lower --fps or write .mp4.", "20"),
    Case(f"{PLAN} --dtype float16", "Use --dtype float32 or auto, or a GPU."),
    Case(f"{PLAN} --vae-dtype float16", "Use --vae-dtype float32, or a GPU."),
    Case(f"{PLAN} --prompt-file f.txt", "Give only one.", retry=PLAN),
]

#: Record of an edit.
EDITED = (
    '{"request": {"prompt": "a", "model": "m"}, "edit": {"video": "v.mp4", "source_prompt": "b c"}}'
)

RANKS, HUB, SERVE = "needs several ranks", "tests/hub", "tests/cli/test_serve.py"
GPU, MACHINE = "tests/unit/runtime/test_device.py", "tests/unit/manage/test_machine_engine.py"
OPEN_SORA = "tests/cli/test_opensora.py"
ENHANCE = "tests/cli/test_enhance.py"
RESUME = "test_a_checkpoint_of_another_prompt"

#: Advice that this table cannot type, and the test that brings it about, or the reason.
ELSEWHERE = {
    "pip install mkl": "tests/unit/runtime/test_blas.py",
    "Add --preview, or leave it out.": "tests/unit/video/test_obstacles.py",
    "Open-Sora's %s%s is --aspect-ratio %s": OPEN_SORA,
    "--save-fps {}": OPEN_SORA,
    "Give --fps {}": OPEN_SORA,
    "Change --sample-name.": OPEN_SORA,
    "Leave out --prompt-as-path.": OPEN_SORA,
    "Make a model folder with mlx_sora convert": OPEN_SORA,
    "Give --condition-frames, in frames": OPEN_SORA,
    "--guidance {} may be too high": "tests/unit/runtime/test_health.py",
    "--no-health-check continues anyway": "tests/unit/runtime/test_health.py",
    "to check the weights: python -m mlx_sora doctor {}": "tests/unit/runtime/test_health.py",
    "--sequential-guidance": "tests/unit/memory/test_planner.py",
    "--vae-dtype bfloat16": "tests/unit/memory/test_planner.py",
    "--vae-tiles": "tests/unit/pipeline/test_vae_tiles.py",
    "doctor without --quick compares": "tests/unit/manage/test_doctor.py",
    "--quick leaves that out.": "tests/unit/manage/test_doctor.py",
    "{} --check": "tests/hub/test_repair.py",
    "mv {} && {}": "tests/hub/test_repair.py",
    "Check the model: python -m mlx_sora doctor {}": "tests/unit/manage/test_convert.py",
    "Convert it without --quantize.": "tests/unit/manage/test_convert.py",
    "--endpoint": HUB,
    "--source": HUB,
    "Move it away, or check it with: python -m mlx_sora doctor {}": HUB,
    "Get the model in one of these types": "tests/unit/loading/test_checkpoint.py",
    "For anything else: --model {}": "tests/cli/test_untrained.py",
    "Leave --quantize out": "tests/unit/loading/test_quantization.py",
    "--folder": SERVE,
    "--port": SERVE,
    "--token": SERVE,
    "--listen": SERVE,
    "--allow-host": SERVE,
    "--rate": SERVE,
    'pip install "mlx_sora[serve]"': SERVE,
    "Give the text itself, or a file with --prompt-file.": RANKS,
    "mlx.launch -n 2 -- python -m mlx_sora bench link": RANKS,
    "Start all ranks again": RANKS,
    "Leave --parallel out.": RANKS,
    "Use --parallel sequence": RANKS,
    "Move it, or give --overwrite.": "tests/cli/test_prompt_file.py",
    "Wait for it, or give another --output.": "tests/unit/pipeline/test_locks.py",
    "Remove it, or change --output.": "tests/unit/video/test_obstacles.py",
    "Give a shorter --output.": "tests/unit/video/test_obstacles.py",
    "Give another --output.": "tests/unit/video/test_obstacles.py",
    "Delete it, change --output, or finish that one: {}": RESUME,
    "python -m mlx_sora generate --resume {}": RESUME,
    "Resume from it, or give --overwrite.": "tests/unit/pipeline/test_resume.py",
    "Use --memory-budget": "the case of its replacement",
    "{} with --preset {}": "a table of `doctor --machine`",
    "matplotlib is missing": "tests/cli/test_bench.py",
    "--ranks {} --link {}GB/s,{}ms --chip {}TFLOPS": "tests/cli/test_bench_link.py",
    "Memory budgets may not hold": MACHINE,
    "Run with --memory-budget off": MACHINE,
    "Streamed runs wait for the disk": MACHINE,
    "python -m mlx_sora doctor --machine": "tests/cli/test_dry_run.py",
    "Update MLX (pip install -U mlx).": "tests/unit/manage/test_machine_check.py",
    "Lower --memory-budget (--dry-run shows": GPU,
    "Use --memory-budget with an amount such as": "tests/unit/memory/test_budget.py",
    "{} --memory-budget off tries it all the same": "tests/unit/memory/test_budget.py",
    "sips -s format jpeg {}": "tests/fuzz/shell.py",
    'pip install "mlx-sora[heic]"': "tests/reports/test_phone_pictures.py",
    "{}: {} Add --debug for a traceback.": "tests/cli/test_generate.py",
    "--enhance-prompt": ENHANCE,
    "Install it: {}. Without a model": ENHANCE,
    'pip install "mlx_sora[enhance]"': ENHANCE,
    "They count its prompts from 0; --end-index": OPEN_SORA,
    "Move it, or change --output.": "tests/unit/pipeline/test_preview.py",
    "Give --prompt TEXT": "tests/unit/pipeline/test_calibrate.py",
    "Delete it, or make another: {} --overwrite": "tests/unit/pipeline/test_preview.py",
    "python -m mlx_sora calibrate --preview --model {}": "tests/unit/pipeline/test_preview.py",
    "Give {}; `python -m mlx_sora models` lists": "tests/unit/manage/test_models.py",
    "Add --yes.": "tests/unit/manage/test_models.py",
    "pip has --force-reinstall": "tests/unit/manage/test_doctor.py",
    "add --checkpoint-every 5": "tests/cli/test_interrupts.py",
    "python -m mlx_sora calibrate {}": "the case of its message",
    "or make another: {}": "test_a_table_of_a_lower_speed_is_made_anew",
    "Make it again: {} --overwrite": "tests/unit/loading/test_quantization_choice.py",
}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model, videos and obstacles."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "other").mkdir()
    for part in bundled_folder().iterdir():
        if part.name not in ("step_cache", "token_merging"):
            (tmp_path / "m" / part.name).symlink_to(part)
        if part.name not in ("step_cache", "token_merging", "preview.json"):
            (tmp_path / "other" / part.name).symlink_to(part)
    frames = np.full((17, 64, 64, 3), 90, np.uint8)
    save_frames(tmp_path / "v.mp4", frames, 24, None, False)
    save_frames(tmp_path / "p.png", frames[:1], 24, None, False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model_index.json").write_text("{}")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "gone" / "w.mp4")
    (tmp_path / "e.json").write_text(EDITED)
    record = '{"request": {"prompt": "a", "images": [["gone.png"]]}, "settings": {}}'
    (tmp_path / "r.json").write_text('{"reconstruction": {}}')
    (tmp_path / "images.json").write_text(record)
    (tmp_path / "f.txt").write_text("a\n")
    return tmp_path


class Line:
    """The command line in this process: what a command prints, and its advice."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._errors = list[MlxSoraError]()
        self._capsys = capsys
        monkeypatch.setattr(cli, "_report_error", lambda error, argv: self._errors.append(error))
        monkeypatch.setattr("sys.stdin", StringIO("a red circle"))

    @property
    def message(self) -> str:
        """What was wrong."""
        return self._errors[0].in_flags[0]

    def run(self, words: list[str]) -> tuple[int, str]:
        """Return the exit code, and the advice of the error or of the warnings."""
        self._errors.clear()
        self._capsys.readouterr()
        code = cli.main(words)
        if self._errors:
            message, fix = self._errors[0].in_flags
            return code, fix or message
        lines = self._capsys.readouterr().err.splitlines()
        found = [line.partition(". ")[2] for line in lines if line.startswith("warning: ")]
        return code, " ".join(found)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.says)
@pytest.mark.usefixtures("files")
def test_advice_works_as_typed(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = Line(monkeypatch, capsys)
    words = shlex.split(case.words)
    advice = line.run(words)[1]
    assert matches(case.says, advice), advice
    tried = [shlex.split(case.retry)] if case.retry else list(ways(words, advice, case.values))
    assert tried, "there is something to type"
    for way in tried:
        if case.parse or "--help" in way or way[0] in ("download", "info"):
            parse(way)
            continue
        code, more = line.run(way)
        assert code == 0, (way, more)
        if way[0] == "calibrate" != words[0]:  # makes what the first command needs
            code, more = line.run(words)
        assert code == 0, (way, more)
        assert not matches(case.says, more), (way, more)


def test_a_checkpoint_of_another_prompt(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The prompt is named, not the seed that was drawn, and the command finishes the other one."""
    line = Line(monkeypatch, capsys)
    words = ["generate", "--model", "m", "-o", "c.mp4", "--steps", "3", "--checkpoint-every", "1"]
    with monkeypatch.context() as patch:
        patch.setattr("mlx_sora.pipeline.generate.decode", stop)
        assert line.run([*words, "-p", "a red circle"])[0] == 1
    code, advice = line.run([*words, "-p", "a blue square"])
    assert code == 2
    assert 'the prompt was "a red circle", now "a blue square"' in line.message
    (way,) = ways(words, advice.partition("finish that one: ")[2], "")
    assert line.run(way)[0] == 0
    assert (files / "c.mp4").is_file()


def test_a_table_of_other_steps_is_made_anew(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table is there, so that the command has to overwrite it."""
    line = Line(monkeypatch, capsys)
    words = shlex.split(f"{PLAN} --num-frames 1 --steps 2 --step-cache table:1,file=t.json")
    (way,) = (way for way in ways(words, line.run(words)[1], "") if way[0] == "calibrate")
    assert line.run(way)[0] == 0
    words[words.index("--steps") + 1] = "3"
    code, advice = line.run(words)
    assert (code, "t.json is for 2 steps" in line.message) == (2, True)
    (way,) = (way for way in ways(words, advice, "") if way[0] == "calibrate")
    assert line.run(way)[0] == 0
    assert line.run(words)[0] == 0


def test_a_table_of_a_lower_speed_is_made_anew(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The speed that the table reaches does, and so does a table for the wanted one."""
    line = Line(monkeypatch, capsys)
    assert line.run(shlex.split(f"{MERGING} --tdtm 1.01"))[0] == 0
    words = shlex.split(f"{PLAN} --steps 1 --tdtm table:1.1,file=c.json")
    code, advice = line.run(words)
    assert (code, "c.json reaches 1.0" in line.message) == (2, True)
    lower = f"{advice.split()[2].rstrip(',')},file=c.json"
    assert line.run([*words[:-1], lower])[0] == 0
    (way,) = (way for way in ways(words, advice, "") if way[0] == "calibrate")
    assert line.run(way)[0] == 0
    assert line.run(words)[0] == 0


def stop(*_: object) -> None:
    raise MlxSoraError("stopped")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (f"{PLAN} --image other", "other is a folder. Give the path of an image"),
        (f"{PLAN} --video other", "other is a folder. Give the path of an image"),
        (f"{PLAN} -C other", "other is a folder. Give a video or JSON"),
        ("generate --resume other", "other is a folder. Give a file NAME.checkpoint"),
        ("edit other -p a --source-prompt b", "other is a folder."),
        (f"{PLAN} -o v.mp4/w.mp4", "v.mp4 is not a folder. Change --output."),
        (f"{PLAN} -o .", ". is a folder. Name a file in --output."),
        (f"{PLAN} --memory-budget 500", "the budget is 500 B."),
        (f"{PLAN} --chip m4".replace("--dry-run ", ""), "--chip is for estimates. Add --dry-run."),
        (f"{EDIT} -p '|0|a|1|b'", "The prompt has 2 scenes; only the first is made."),
        ("generate --model m --dry-run -p '|0|a|4000|b'", "2 scenes; only the first is made."),
        (f"{SCENES} --loop 2 --num-frames 34", "only the first is made. Give --loop 3 to make"),
        (
            "info --steps 3",
            "See mlx_sora info --help.",
        ),
        ("bench memory --models m", "Did you mean --model?"),
        ("info m", "unrecognized arguments: m. See mlx_sora info --help."),
    ],
)
@pytest.mark.usefixtures("files")
def test_messages_say_what_is_wrong(
    words: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(shlex.split(words))
    lines = capsys.readouterr().err.splitlines()
    assert any(says in line for line in lines), lines
    assert not any("Traceback" in line or "Add --debug" in line for line in lines)


def test_guidance_has_the_name_of_diffusers(files: Path) -> None:
    args = cli.build_parser().parse_args(["generate", "--guidance-scale", "3"])
    assert args.guidance == 3


def test_every_flag_in_a_message_exists() -> None:
    foreign = {"--reinstall", "--hostfile", "--out", "--env", "--force-reinstall"}
    found = {(name, flag) for name, text in templates() for flag in FLAG.findall(text)}
    assert [each for each in sorted(found) if each[1] not in flags().keys() | foreign] == []


def test_every_advice_has_a_case() -> None:
    known = [*(case.says for case in CASES), *ELSEWHERE]
    texts = {text for _, text in templates()}
    missing = sorted(text for text in texts if not any(says in text for says in known))
    assert not missing, "\n".join(missing)
    assert [says for says in ELSEWHERE if not any(says in text for text in texts)] == []
