"""What files and words of others can never do: run code, reach a shell, leave their folder."""

from __future__ import annotations

import ast
import json
import os
import re
from itertools import pairwise
from pathlib import Path

import pytest

from mlx_sora.cli.main import main
from mlx_sora.errors import MAX_MESSAGE, MlxSoraError, UsageError, WeightsError, printable
from mlx_sora.loading.checkpoint import PICKLE_SUFFIXES, Checkpoint
from mlx_sora.loading.model_folder import ModelFolder
from mlx_sora.video.metadata import read_metadata
from mlx_sora.video.reader import image_size, probe_video
from tests.fuzz import samples
from tests.fuzz.targets import _listing
from tests.helpers.source import Source, sources

#: Modules that run what they read, or unpack what may lie outside.
CODE = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "torch", "tarfile", "zipfile"}
#: Calls that do, or that start a shell; `eval` of MLX is an attribute and no name.
CALLS = {"eval", "exec", "compile", "__import__"}
SHELLS = {"os.system", "os.popen", "os.execvp", "subprocess.getoutput", "shutil.unpack_archive"}

#: The only modules that start a process, and with words that are no prompt's own.
STARTERS = {
    *("mlx_sora.cli.bench.measure", "mlx_sora.cli.awake", "mlx_sora.cli.display"),
    "mlx_sora.text.enhance",
    *("mlx_sora.server.helper", "mlx_sora.server.processes"),
}


def calls(source: Source) -> list[ast.Call]:
    return [node for node in ast.walk(source.tree) if isinstance(node, ast.Call)]


def named(call: ast.Call) -> str:
    return ast.unparse(call.func)


def test_nothing_that_is_read_can_run() -> None:
    found = [
        f"{s.name}:{line} {name}"
        for s in sources("mlx_sora")
        for line, name in s.imports()
        if name.split(".")[0] in CODE
    ]
    found += [
        f"{s.name}:{call.lineno} {named(call)}"
        for s in sources("mlx_sora")
        for call in calls(s)
        if (isinstance(call.func, ast.Name) and call.func.id in CALLS)
        or named(call) in ("np.load", "numpy.load", "torch.load")
        or any(each.arg == "allow_pickle" for each in call.keywords)
    ]
    assert found == []


def test_every_file_of_arrays_is_opened_as_safetensors() -> None:
    """`mx.load` would take .npy and .gguf by their names."""
    loads = [
        (s, call) for s in sources("mlx_sora") for call in calls(s) if named(call) == "mx.load"
    ]
    assert loads
    for source, call in loads:
        kinds = [ast.literal_eval(each.value) for each in call.keywords if each.arg == "format"]
        assert kinds == ["safetensors"], source.name


def test_nothing_reaches_a_shell() -> None:
    found = []
    for source in sources("mlx_sora"):
        starts = any(name.split(".")[0] == "subprocess" for _, name in source.imports())
        if starts and source.module not in STARTERS:
            found.append(f"{source.name} starts a process")
        for call in calls(source):
            shell = any(each.arg == "shell" for each in call.keywords)
            if shell or named(call) in SHELLS:
                found.append(f"{source.name}:{call.lineno} {named(call)}")
    assert found == []


#: Text after which a value is a word of a command.
COMMAND = re.compile(r"\b(python -m|mlx\.launch|git|mv|rm|sips|pip install)( [^.:()]*)?[ =]$")


def test_words_of_others_in_commands_are_quoted() -> None:
    """A value in a command is a constant, or goes through `shell_words`."""
    found, quoted = [], 0
    for source in sources("mlx_sora"):
        if source.module != "mlx_sora.errors":
            found += [
                f"{source.name}:{n} {x}" for n, x in source.imports() if x.startswith("shlex")
            ]
        for node in ast.walk(source.tree):
            values = node.values if isinstance(node, ast.JoinedStr) else []
            for text, value in pairwise(values):
                if not isinstance(text, ast.Constant) or not COMMAND.search(str(text.value)):
                    continue
                assert isinstance(value, ast.FormattedValue)
                code = ast.unparse(value.value)
                quoted += code.startswith("shell_words(")
                if not code.startswith("shell_words(") and not code.isupper():
                    found.append(f"{source.name}:{node.lineno} {code}")
    assert found == []
    assert quoted > 3


@pytest.mark.parametrize("suffix", PICKLE_SUFFIXES)
@pytest.mark.parametrize("how", ["file", "folder", "index"])
def test_pickles_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, how: str
) -> None:
    monkeypatch.chdir(tmp_path)  # where the pickle would leave its file
    file = tmp_path / f"model{suffix}"
    file.write_bytes(b"\x80\x04cos\nsystem\n(S'touch owned'\ntR.")
    if how == "index":
        content = {"weight_map": {"x": file.name}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(WeightsError, match="never opened"):
        Checkpoint.open(file if how == "file" else tmp_path)
    assert not Path("owned").exists()


def shards(folder: Path) -> None:
    folder.mkdir()
    for name, content in samples.shards().items():
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    "name", ["../away/a.safetensors", "{away}/a.safetensors", "a\0.safetensors"]
)
def test_an_index_names_files_of_its_folder_only(tmp_path: Path, name: str) -> None:
    shards(tmp_path / "away")
    shards(tmp_path / "model")
    name = name.format(away=tmp_path / "away")
    content = {"weight_map": {"x": name, "y": "b.safetensors"}}
    (tmp_path / "model" / "m.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(WeightsError, match="outside its folder"):
        Checkpoint.open(tmp_path / "model")


def test_a_link_does_not_lead_a_shard_out_of_the_folder(tmp_path: Path) -> None:
    """But a folder of nothing but links into one place, as the hub's cache makes it, is whole."""
    shards(tmp_path / "away")
    index = tmp_path / "model" / "m.safetensors.index.json"
    shards(tmp_path / "model")
    index.write_bytes(samples.indexes()[0])
    assert set(Checkpoint.open(tmp_path / "model").tensors) == {"x", "y"}
    (tmp_path / "model" / "a.safetensors").unlink()
    (tmp_path / "model" / "a.safetensors").symlink_to(tmp_path / "away" / "a.safetensors")
    with pytest.raises(WeightsError, match="leaves the folder"):
        Checkpoint.open(tmp_path / "model")
    index.rename(tmp_path / "away" / index.name)
    index.symlink_to(tmp_path / "away" / index.name)
    assert set(Checkpoint.open(tmp_path / "model").tensors) == {"x", "y"}


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="not a file"):
        Checkpoint.open(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "m.safetensors.index.json")
    with pytest.raises(WeightsError, match="not a regular file"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["../config.json", "/config.json", "a/../../b", "a\\b", "\x1b[2J"])
def test_a_listing_that_leads_outside_is_refused(tmp_path: Path, name: str) -> None:
    answer = json.loads(samples.listings()[0])
    answer["siblings"].append({"rfilename": name})
    with pytest.raises(WeightsError, match="outside its folder"):
        _listing(json.dumps(answer).encode(), tmp_path)


@pytest.mark.parametrize(
    "text", ["ffconcat version 1.0\nfile secret.mp4\n", "#EXTM3U\nsecret.mp4\n"]
)
def test_a_playlist_opens_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "secret.mp4").write_bytes(samples.media(".mp4")[0])
    (tmp_path / "a.mp4").write_text(text)
    for read in (probe_video, read_metadata):
        with pytest.raises(UsageError, match="Cannot read"):
            read(tmp_path / "a.mp4")


def test_the_name_of_a_file_is_no_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "concat:a.mp4|b.mp4"
    (tmp_path / name).write_bytes(samples.media(".mp4")[0])
    assert probe_video(name).num_frames == 3


def test_postscript_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    with pytest.raises(UsageError, match="Cannot read"):
        image_size(tmp_path / "a.png")


@pytest.mark.parametrize("text", ["\x1b[31mred", "a\nb", "\x9b2J", "\u202ecba", "\ud800", "\0\x07"])
def test_errors_are_one_line_that_a_terminal_does_not_obey(text: str) -> None:
    for error in (MlxSoraError(text, text), UsageError(f"{text!r}"), WeightsError(text * 10_000)):
        assert str(error).isprintable()
        assert len(str(error)) < 2 * MAX_MESSAGE + 100


def test_what_is_printable_stays() -> None:
    for text in ("", "a 中 é 🎬", "path/with-dash_0.mp4", "x" * MAX_MESSAGE):
        assert printable(text) == text
    assert printable("a\tb\x1b") == "a\\tb\\x1b"
    assert printable("start" + "x" * 2000 + "end").startswith("start")
    assert printable("start" + "x" * 2000 + "end").endswith("end")


def test_prompts_and_names_cannot_draw_on_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text('{"request": {"prompt": "a", "\\u001b[2Jx": 1}}')
    lines = [
        {"prompt": "\x1b[31m" + "{" * 3},
        {"\x1b[31m": 1},
        {"prompt": "a", "output": "\x1b.mp4"},
    ]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, lines)))
    commands = (["-C", "a.json"], ["-p", "a", "--model", "\x1b[31m"], ["--prompt-file", "b.jsonl"])
    for words in (*commands, ["-p", "a", "-o", "\x1b]0;x\x07.mp4"], ["--\x1b[2J"]):
        assert main(["generate", *words]) != 0
        captured = capsys.readouterr()
        assert "\x1b" not in captured.out + captured.err
        assert "error: " in captured.err


def test_a_record_cannot_show_a_picture_that_it_was_not_made_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "private.png"
    picture.write_bytes(samples.pictures()[4])
    sums = {"path": str(picture), "sha256": "0" * 64}
    written = json.dumps({"reference_path": str(picture), "mask_strategy": "0"})
    hidden = {"prompt": f"a {written}"}
    for request in ({"prompt": "a", "images": [[str(picture), 0, 1]]}, hidden):
        for settings in ({}, {"media": [sums]}):
            record = tmp_path / "a.json"
            record.write_text(json.dumps({"request": request, "settings": settings}))
            assert main(["generate", "-C", str(record), "--dry-run"]) == 2
            assert "is not the file that" in capsys.readouterr().err


def test_a_model_cannot_put_words_into_a_command(tmp_path: Path) -> None:
    from mlx_sora.manage.doctor import repair_command

    for data in samples.provenances():
        content = json.loads(data)
        content["conversion"] = {"source": "/tmp", "dtype": "x; touch owned", "quantization": None}
        (tmp_path / "provenance.json").write_text(json.dumps(content))
        assert "owned" not in repair_command(tmp_path)


def test_a_model_of_nobody_is_a_plain_error() -> None:
    with pytest.raises(WeightsError, match="no such user"):
        ModelFolder.open("~nobody-there/model")
