"""Routes of videos and files beyond what OpenAI's client speaks, by plain requests."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from mlx_sora.request.generation import options
from mlx_sora.server.schema import option_types, public_options
from mlx_sora.server.store import Job
from tests.helpers.fake_queue import FakeQueue
from tests.helpers.web import Web, form


def create(web: Web, **more: Any) -> str:
    answer = web.post("/v1/videos", {"prompt": "a red circle", **more})
    assert answer.status == 200, answer.body
    return str(answer.json["id"])


def test_json_keeps_types(web: Web, queue: FakeQueue) -> None:
    id = create(web, steps=5, ci_dl=True, fps=12.5, model=None, images=[])
    found = dict(queue.get(id).task.options)
    del found["seed"]
    assert found == {"prompt": "a red circle", "steps": 5, "ci_dl": True, "fps": 12.5}


def test_an_edit_by_its_kind(web: Web, queue: FakeQueue) -> None:
    file = web.request("POST", "/v1/files", *form({"file": ("a.mp4", b"video")})).json
    id = create(web, kind="edit", video=file["id"], source_prompt="a circle")
    task = queue.get(id).task
    assert (task.kind, task.options["video"]) == ("edit", file["id"])


def test_cancel_resume_and_move(web: Web, queue: FakeQueue) -> None:
    first, second = create(web), create(web)
    cancelled = web.post(f"/v1/videos/{first}/cancel", {}).json
    assert (cancelled["status"], cancelled["error"]["code"]) == ("failed", "cancelled")
    assert (cancelled["mlx_sora"]["state"], cancelled["mlx_sora"]["checkpoint"]) == (
        *("cancelled", True),
    )
    assert web.post(f"/v1/videos/{first}/cancel", {}).code == "wrong_state"
    assert web.request("POST", f"/v1/videos/{first}/resume").json["status"] == "queued"
    moved = web.post(f"/v1/videos/{second}/move", {"before": first}).json
    assert moved["mlx_sora"]["position"] == 0
    assert web.post(f"/v1/videos/{second}/move", {}).json["mlx_sora"]["position"] == 99
    assert web.post(f"/v1/videos/{second}/move", {"before": 3}).json["error"]["param"] == "before"
    assert web.post(f"/v1/videos/{second}/move", {"before": "\ud800"}).status == 400
    assert web.post(f"/v1/videos/{second}/move", {"behind": first}).status == 400


def test_repeat_with_changes(web: Web, queue: FakeQueue) -> None:
    id = create(web, seed=5, steps=7, size="128x96")
    changes = {"seed": 6, "steps": None, "seconds": "2"}
    again: Job = queue.get(web.post(f"/v1/videos/{id}/repeat", {"changes": changes}).json["id"])
    assert (again.parent, again.parent_kind) == (id, "repeat")
    assert dict(again.task.options) == {
        "prompt": "a red circle",
        "seed": 6,
        "width": 128,
        "height": 96,
        "num_frames": 51,
    }
    wrong = {"changes": {"sede": None}}
    refused = web.post(f"/v1/videos/{id}/repeat", wrong).json["error"]
    assert "Did you mean seed?" in refused["message"]
    assert web.post(f"/v1/videos/{id}/repeat", {"changes": 3}).status == 400
    assert web.post(f"/v1/videos/{id}/repeat", {"prompt": "x"}).status == 400


def test_list_by_state(web: Web, queue: FakeQueue) -> None:
    waiting, done = create(web), create(web)
    queue.finish(done)
    assert [v["id"] for v in web.get("/v1/videos?state=done").json["data"]] == [done]
    both = web.get("/v1/videos?state=done,queued&order=asc").json
    assert [v["id"] for v in both["data"]] == [waiting, done]
    answer = web.get("/v1/videos?state=drawn")
    assert (answer.status, answer.json["error"]["param"]) == (400, "state")


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=101", "limit=x", "order=up", "after=" + "x" * 101]
)
def test_a_wrong_query_is_a_line(query: str, web: Web) -> None:
    answer = web.get(f"/v1/videos?{query}")
    assert (answer.status, answer.json["error"]["param"]) == (400, query.partition("=")[0])


def test_content_has_a_type_a_tag_and_ranges(web: Web, queue: FakeQueue) -> None:
    id = create(web)
    assert web.get(f"/v1/videos/{id}/content").code == "wrong_state"
    queue.finish(id)
    path = f"/v1/videos/{id}/content"
    whole = web.get(path)
    assert (whole.status, whole.headers["content-type"]) == (200, "video/mp4")
    assert whole.headers["cache-control"] == "private, no-cache"
    same = web.get(path, {"If-None-Match": whole.headers["etag"]})
    assert (same.status, same.body) == (304, b"")
    part = web.get(path, {"Range": "bytes=5-9"})
    assert (part.status, part.body) == (206, whole.body[5:10])
    assert part.headers["content-range"] == f"bytes 5-9/{len(whole.body)}"
    assert web.get(path, {"Range": "bytes=9999-"}).status == 416
    assert web.get(f"{path}?variant=record").headers["content-type"] == "application/json"
    assert web.get(f"{path}?variant=weights").json["error"]["param"] == "variant"
    (queue.folder / f"{id}-video.mp4").unlink()
    assert web.get(path).code == "not_found"


def test_a_full_temporary_folder_is_a_line(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("starlette.formparsers.SpooledTemporaryFile", full)
    answer = web.request("POST", "/v1/files", *form({"file": ("a.png", b"picture")}))
    assert (answer.status, answer.code) == (500, "run_failed")
    assert "No space left on device. Make room there" in answer.json["error"]["message"]


def test_uploads(web: Web, queue: FakeQueue) -> None:
    answer = web.request("POST", "/v1/files", *form({"file": ("ä.png", b"picture with record")}))
    file = answer.json
    assert (file["object"], file["kind"], file["frames"]) == ("file", "image", 1)
    assert (file["filename"], file["request"]) == ("ä.png", {"prompt": "a red circle"})
    assert web.get(f"/v1/files/{file['id']}").json == file
    content = web.get(f"/v1/files/{file['id']}/content?variant=thumbnail")
    assert content.body == b"picture with record"
    gone = web.request("DELETE", f"/v1/files/{file['id']}")
    assert gone.json == {"id": file["id"], "deleted": True, "object": "file"}
    assert web.get(f"/v1/files/{file['id']}").code == "not_found"
    assert web.get("/v1/files/file-0/content").code == "not_found"
    refused = web.request("POST", "/v1/files", *form({"file": ("a.txt", b"text")}))
    assert (refused.status, refused.code) == (400, "invalid_value")
    missing = web.request("POST", "/v1/files", *form({"file": "text"})).json["error"]
    assert missing["param"] == "file"


def test_a_plan(web: Web, queue: FakeQueue) -> None:
    plan = web.post("/v1/plan", {"prompt": "a red circle", "size": "128x96", "seconds": 2}).json
    assert (plan["object"], plan["size"], plan["frames"]) == ("plan", "128x96", 51)
    assert (plan["fits"], plan["peak"], plan["smallest"]) == (True, 100, 50)
    assert web.post("/v1/plan", {"prompt": "x", "num_frames": 2000}).json["fits"] is False
    assert queue.list() == []


def test_the_options_are_those_of_the_request(web: Web) -> None:
    answer = web.get("/v1/options").json
    records = {record["name"]: record for record in answer["data"]}
    hidden = {name for name in options() if name not in records}
    assert hidden == {
        *("mask_strategy", "references", "original_prompt"),  # Python's own
        *("overwrite", "metadata", "checkpoint_every", "keep_previews", "parallel"),  # the server's
    }
    steps = records["steps"]
    assert (steps["type"], steps["flag"], steps["low"]) == ("int", "--steps", 1)
    assert steps["common"] is True
    assert records["preset"]["choices"] == [preset["name"] for preset in answer["presets"]]
    assert {records[n]["type"] for n in ("images", "videos", "ci_dl", "fps", "prompt")} == {
        *("images", "videos", "bool", "float", "text"),
    }
    edit = {record["name"]: record for record in web.get("/v1/options?task=edit").json["data"]}
    assert {"source_prompt", "inject_steps"} < edit.keys()
    assert "seed" not in edit
    assert edit["sampler"]["default"] == "midpoint"
    assert web.get("/v1/options?task=bench").status == 400


@pytest.mark.parametrize("name", sorted(public_options("generate")))
def test_every_option_reaches_the_job(name: str, web: Web, queue: FakeQueue) -> None:
    """Also one that is added tomorrow: as JSON, and as the text of a form."""
    file = web.request("POST", "/v1/files", *form({"file": ("a.png", b"picture")})).json["id"]
    value = sample(name, file)
    more = {"height": 80} if name == "width" else {"width": 80} if name == "height" else {}
    by_json = queue.get(create(web, **({name: value} | more))).task.options
    assert name == "model" or by_json[name] != options()[name].default
    text = {True: "true", False: "false"}.get(value, value) if isinstance(value, bool) else value
    fields = {"prompt": "a red circle", "seed": by_json["seed"], name: text, **more}
    answer = web.request("POST", "/v1/videos", *form(fields))
    assert queue.get(answer.json["id"]).task.options == by_json


def sample(name: str, file: str) -> Any:
    """A value that is not the default, by the type of the option."""
    fixed = {
        "model": "shapes",
        "output": "gif",
        "quantize": 8,
        "vae_tiles": 2,
        "resolution": "240p",
        "aspect_ratio": "1:1",
        "num_frames": "2s",
        "memory_budget": "3GB",
        "device_profile": "mac-16gb",
        "step_cache": "every:3",
        "guidance_interval": "200,800",
        "refine": "240p",
    }
    option, kind = options()[name], option_types()[name]
    if name in fixed:
        return fixed[name]
    if kind == "bool":
        return not option.default
    if kind == "choice":
        return next(choice for choice in option.choices if choice != option.default)
    if kind in ("images", "videos"):
        return f'["{file}"]'
    return {"int": 34, "float": 0.5, "text": "off"}[kind]


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("{", "application/json"),
        ("[1]", "application/json"),
        ('{"prompt": "a", "prompt": "b"}', "application/json"),
        ("[" * 100_000, "application/json"),
        (b"\xff\xfe", "application/json"),
        ("prompt=a", "application/x-www-form-urlencoded"),
        ('{"prompt": "a"}', "text/plain"),
        ("no form", "multipart/form-data"),
        ("no form", "multipart/form-data; boundary=x"),
        ("--x\r\nno header\r\n\r\n1\r\n--x--", "multipart/form-data; boundary=x"),
    ],
)
def test_a_malformed_body_is_a_line(body: str | bytes, kind: str, web: Web) -> None:
    answer = web.request("POST", "/v1/videos", body, {"Content-Type": kind})
    assert (answer.status, answer.code) in ((400, "malformed"), (400, "invalid_value"))
    assert "\n" not in answer.json["error"]["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"a[": "1"},
        {"a[[b]]": "1"},
        {"images[0][1][2][3][4]": "1"},
        {"x" * 81: "1"},
        {"input_reference[id]": "x", "input_reference[]": "y"},
    ],
)
def test_odd_names_of_fields_are_refused(fields: dict[str, str], web: Web) -> None:
    answer = web.request("POST", "/v1/videos", *form({"prompt": "a", **fields}))
    assert answer.status == 400, answer.body


def test_a_field_that_comes_twice_is_refused(web: Web) -> None:
    one, headers = form({"prompt": "a"})
    two = one.replace(b"--xxboundaryxx--\r\n", b"") + one
    answer = web.request("POST", "/v1/videos", two, headers)
    assert "'prompt' comes twice" in answer.json["error"]["message"]


@pytest.mark.parametrize("name", ["\ud800", "a\nb", "x" * 10_000])
def test_odd_names_of_options_are_a_line(name: str, web: Web) -> None:
    answer = web.post("/v1/videos", {"prompt": "a", name: 1})
    assert (answer.status, answer.code) == (400, "invalid_value")
    assert len(answer.json["error"]["param"]) <= 110
    assert answer.json["error"]["message"].isprintable()


def test_unknown_places_and_methods_have_the_same_form(web: Web) -> None:
    answer = web.get("/v1/nothing")
    assert (answer.status, answer.code) == (404, "not_found")
    answer = web.request("PUT", "/v1/videos")
    assert (answer.status, answer.json["error"]["type"]) == (405, "invalid_request_error")
