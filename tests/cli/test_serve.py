"""`serve` as a process with the bundled model: the command, its link, and the server's README."""

from __future__ import annotations

import io
import json
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from openai import OpenAI

from mlx_sora.cli.main import build_parser, main
from mlx_sora.cli.serve import DEFAULT_PORT, open_socket, show_address
from mlx_sora.server.security import Access
from tests.helpers.server_process import ServerProcess, server_process
from tests.helpers.web import Web

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

README = Path(__file__).parents[2] / "mlx_sora" / "server" / "README.md"
PROMPT = "a red circle moving right on a black background"
omit: Any = openai.omit

#: The command, which writes the modules in memory to a file when it ends.
WATCHED = """
import atexit, json, sys
atexit.register(lambda: open("modules.json", "w").write(json.dumps(sorted(sys.modules))))
from mlx_sora.cli.main import main
sys.exit(main(["serve", *sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve") / "videos"


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    with server_process(folder, program=["-c", WATCHED], cwd=folder.parent) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> OpenAI:
    return OpenAI(base_url=f"{server.link}v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def circle(client: OpenAI) -> openai.types.Video:
    """A finished video."""
    video = client.videos.create_and_poll(prompt=PROMPT, extra_body={"steps": 4, "seed": 1})
    assert video.status == "completed", video.error
    return video


def test_a_video_and_its_pictures(client: OpenAI, circle: openai.types.Video) -> None:
    assert (circle.size, circle.seconds, circle.progress, circle.model) == (
        *("64x64", "0.71"),
        *(100, "shapes"),
    )
    starts = {"video": b"ftyp", "thumbnail": b"RIFF", "spritesheet": b"\xff\xd8"}
    for variant, start in starts.items():
        content = client.videos.download_content(circle.id, variant=variant).read()  # type: ignore
        assert start in content[:8]


def test_its_record_and_events(server: ServerProcess, circle: openai.types.Video) -> None:
    record = server.web.get(f"/v1/videos/{circle.id}/content?variant=record").json
    assert record["request"]["prompt"] == PROMPT
    with socket.create_connection(("127.0.0.1", server.web.port), timeout=20) as connection:
        path = f"/v1/videos/{circle.id}/events"
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        found = []
        for line in connection.makefile("rb"):
            if line.startswith(b"data: "):
                found.append(json.loads(line[6:]))
                if found[-1].get("state") == "done":
                    break
    kinds = [event["event"] for event in found]
    assert kinds.count("step_finished") == 4
    assert {"stage_started", "stage_finished", "finished"} <= set(kinds)


def test_remix_and_extend(client: OpenAI, circle: openai.types.Video) -> None:
    prompt = PROMPT.replace("red", "blue")
    remix = client.videos.remix(circle.id, prompt=prompt, extra_body={"steps": 2})
    more: Any = {"seconds": "0.71", "video": omit}
    source = {"video": {"id": circle.id}, "steps": 2}
    longer = client.videos.extend(prompt=PROMPT, extra_body=source, **more)
    finished = [client.videos.poll(video.id) for video in (remix, longer)]
    assert [video.error for video in finished] == [None] * 2
    assert [video.seconds for video in finished] == ["0.71", "1.42"]
    assert finished[0].remixed_from_video_id == circle.id


def test_a_picture_to_begin_with(client: OpenAI, circle: openai.types.Video) -> None:
    picture = client.videos.download_content(circle.id, variant="thumbnail").read()
    video = client.videos.create_and_poll(
        prompt=PROMPT, input_reference=("a.webp", picture), extra_body={"steps": 2}
    )
    assert video.status == "completed", video.error


def test_a_video_of_the_server_comes_back_with_its_request(
    client: OpenAI, server: ServerProcess, circle: openai.types.Video
) -> None:
    content = client.videos.download_content(circle.id).read()
    file = client.files.create(file=("mine.mp4", content), purpose="vision")
    assert file.model_extra is not None
    assert file.model_extra["request"]["prompt"] == PROMPT
    edit: Any = client.videos.edit(
        prompt="a blue circle", video=("mine.mp4", content), extra_body={"steps": 2}
    )
    assert edit.mlx_sora["options"]["source_prompt"] == PROMPT
    client.videos.delete(edit.id)


def test_what_is_no_picture_or_video_is_a_line(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.videos.create(prompt=PROMPT, input_reference=("a.png", b"no picture"))
    assert "\n" not in str(caught.value.body)


def test_the_models_say_what_they_draw(client: OpenAI) -> None:
    [shapes] = [model for model in client.models.list() if model.id == "shapes"]
    assert shapes.model_extra is not None
    assert shapes.model_extra["mlx_sora"]["defaults"]["width"] == 64


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)


def test_the_readme_starts_it() -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert lines[:2] == ['pip install -e ".[serve]"', "python -m mlx_sora serve"]
    assert f"http://127.0.0.1:{DEFAULT_PORT}/" in README.read_text()


@pytest.mark.parametrize(
    "program",
    [line for block in blocks("bash") for line in block.splitlines() if line.startswith("curl")]
    + blocks("python"),
)
def test_a_command_of_the_readme(program: str, server: ServerProcess, tmp_path: Path) -> None:
    program = program.replace(f"127.0.0.1:{DEFAULT_PORT}", f"127.0.0.1:{server.web.port}")
    shell = ["bash", "-euc"] if program.startswith("curl") else [sys.executable, "-c"]
    result = subprocess.run(
        [*shell, program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() or list(tmp_path.iterdir())
    assert '"error":{' not in result.stdout


def test_links_of_the_readme_exist() -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text())
    assert targets
    assert [target for target in targets if not (README.parent / target).exists()] == []


def test_all_routes_are_in_the_readme(server: ServerProcess) -> None:
    text = README.read_text()
    for path in server.web.get("/openapi.json").json["paths"]:
        last = path.replace("{id}", "ID").removeprefix("/v1/videos/ID")
        assert last in text or path.removesuffix("/{id}").removesuffix("/{id}/content") in text


def test_a_second_server_of_the_folder_and_of_the_port(
    server: ServerProcess, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fail(capsys, "--folder", str(folder), "--port", "0")
    assert str(folder) in line
    line = fail(capsys, "--folder", str(tmp_path), "--port", str(server.web.port))
    assert f"port {server.web.port}: Address already in use. Give another --port" in line


def test_the_server_stays_light_and_ends_at_ctrl_c(
    server: ServerProcess, circle: openai.types.Video, folder: Path
) -> None:
    """The last test of this server: networks, arrays and media are for other processes."""
    size = psutil.Process(server.process.pid).memory_info().rss
    assert size <= 80e6
    assert server.stop(signal.SIGINT) == 0
    loaded = {
        name.split(".")[0] for name in json.loads((folder.parent / "modules.json").read_text())
    }
    assert loaded & {"mlx", "numpy", "av", "PIL", "torch", "huggingface_hub"} == set()
    assert "fastapi" in loaded
    log = folder.with_name("videos.log").read_text()
    assert log == f"videos in {folder}; Ctrl-C ends the server\n"
    assert (folder / "videos" / f"{circle.id}.mp4").is_file()


def fail(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Return the one line of a server that does not start."""
    assert main(["serve", *options]) in (1, 2)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "argument --port: must be 0 to 65535, not '70000'."),
        (["--queue-length", "0"], "argument --queue-length: must be 1 to 100000, not '0'."),
        (["--rate", "x"], "argument --rate: must be 1 to 1000000, not 'x'."),
        (["--token", "short"], "A token has 16 to 200 letters"),
        (["--listen", "no.such.name.invalid"], "'no.such.name.invalid' is no address of this"),
        (["--listen", "192.0.2.1"], "Cannot listen on 192.0.2.1"),
        (["--folder", "/dev/null/x"], "Cannot write into /dev/null/x: Not a directory."),
        (["--folder", "FILE"], "Give another --folder."),
        (["--prompt", "x"], "unrecognized arguments: --prompt x."),
    ],
)
def test_what_is_wrong_is_a_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    options = [word.replace("FILE", str(tmp_path / "file")) for word in options]
    folder = [] if "--folder" in options else ["--folder", str(tmp_path / "videos")]
    assert message in fail(capsys, *folder, *options)


def test_without_the_extra_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "segno", None)
    line = fail(capsys, "--folder", str(tmp_path))
    assert line == 'error: serve needs segno. Run: pip install "mlx_sora[serve]"\n'


def test_a_server_for_other_machines_has_a_link_with_a_token(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    links = []
    for _ in range(2):
        with server_process(folder, "--listen", "0.0.0.0") as server:
            links.append(server.link)
            match = re.fullmatch(r"http://([^/]+):\d+/\?token=([A-Za-z0-9_-]{32})", server.link)
            assert match is not None, server.link
            web = Web(server.web.port)
            assert web.get("/v1/videos").code == "no_token"
            assert web.get("/v1/videos", {"Authorization": f"Bearer {match[2]}"}).status == 200
            assert "HttpOnly" in web.get(f"/?token={match[2]}").headers["set-cookie"]
            assert web.get("/healthz", {"Host": match[1]}).status == 200
            assert web.get("/healthz", {"Host": "evil.example"}).code == "wrong_host"
            assert server.stop(signal.SIGTERM) == 0
    assert links[0].partition("?")[2] == links[1].partition("?")[2]  # a phone stays connected
    assert stat.S_IMODE((folder / "token").stat().st_mode) == 0o600


def test_a_token_of_the_environment_is_needed_on_this_machine_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_SORA_TOKEN", "a.token~of-this_machine")
    with server_process(tmp_path / "videos", "--allow-host", "Proxy.Example") as server:
        assert server.link.endswith("/?token=a.token~of-this_machine")
        assert server.web.get("/v1/videos").code == "no_token"
        assert server.web.get("/healthz", {"Host": "proxy.example"}).status == 200


def test_answers_are_sent_at_once() -> None:
    """asyncio waits for no acknowledgement only if the listening socket says that it is TCP."""
    with open_socket("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP
        with socket.create_connection(listener.getsockname()):
            accepted, _ = listener.accept()
            assert accepted.proto == socket.IPPROTO_TCP
            accepted.close()


def test_the_terminal_shows_a_qr_code_of_the_link(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("0.0.0.0", 0)) as listener:
        access = Access(token="a-token-of-enough-letters", listening=True)
        stream = Terminal()
        show_address(listener, access, Path("folder"), ["A note."], stream)
    [link] = capsys.readouterr().out.splitlines()
    assert link.endswith("/?token=a-token-of-enough-letters")
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["A note.", "videos in folder; Ctrl-C ends the server"]
    assert len(lines) > 14
    assert {len(line) for line in lines[2:]} == {len(lines[2])}
    assert set("".join(lines[2:])) <= set("█▀▄ ")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_help_of_the_program_lists_it() -> None:
    help = build_parser().format_help()
    assert re.search(r"^ +serve  +serve a page and an HTTP API", help, re.MULTILINE)
