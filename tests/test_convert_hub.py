"""Export: a grid in the model card, a summary, and an upload to a server that stands in for the Hugging Face Hub."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.networks import make_run
from tests.test_convert_export import export, run_convert

TOKEN = "hf_" + "s3cret" * 5


class StandIn(ThreadingHTTPServer):
    """Takes a repository and commits to it, as the Hub does; a `fault` is what it says to everything."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: list[dict[str, Any]] = []
        self.commits: list[dict[str, bytes]] = []
        self.tokens: set[str | None] = set()
        self.fault: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.server.fault is not None:
            return self._answer(self.server.fault, {"error": f"no, not with {self.headers.get('Authorization')}"})
        if self.path == "/api/repos/create":
            self.server.repositories.append(json.loads(body))
            return self._answer(200, {"url": f"{self.server.url}/me/{json.loads(body)['name']}"})
        if "/preupload/" in self.path:
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            files = [{"path": file["path"], **mode} for file in json.loads(body)["files"]]
            return self._answer(200, {"files": files})
        if "/commit/" in self.path:
            lines = [json.loads(line)["value"] for line in body.splitlines() if b'"file"' in line[:40]]
            self.server.commits.append({line["path"]: base64.b64decode(line["content"]) for line in lines})
            oid = "0" * 40
            return self._answer(200, {"commitUrl": f"{self.server.url}/me/c/commit/{oid}", "commitOid": oid})
        return self._answer(200, {"errors": [], "warnings": []})

    def do_GET(self) -> None:
        self._answer(200, {"id": "me/ours", "siblings": [], "sha": "0" * 40})

    def _answer(self, code: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with StandIn() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", server.url)
        yield server
        server.shutdown()
        thread.join()


def test_an_export_is_uploaded_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hub: StandIn
) -> None:
    run, _ = make_run(tmp_path)
    out = export(monkeypatch, run, "--push-to-hub", "ours")
    printed = capsys.readouterr()
    assert [repository["name"] for repository in hub.repositories] == ["ours"]
    (commit,) = hub.commits
    assert commit == {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert printed.out.splitlines()[-1] == f"uploaded to {hub.url}/me/ours"
    assert TOKEN not in printed.out + printed.err


def test_an_upload_that_is_refused_is_one_line_and_the_folder_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hub: StandIn
) -> None:
    run, _ = make_run(tmp_path)
    hub.fault = 403
    out = tmp_path / "out"
    assert run_convert(monkeypatch, "export", "--run", run, "--out", out, "--push-to-hub", "ours") == 2
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if line.startswith("error:")]
    assert line.startswith("error: --push-to-hub ours: not uploaded (")
    assert line.endswith(f"{out} is whole, upload it by `hf upload ours {out}`")
    assert TOKEN not in printed.out + printed.err
    assert (out / "unet" / "diffusion_pytorch_model.safetensors").is_file()


def test_a_name_that_no_repository_has_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = make_run(tmp_path)
    out = tmp_path / "out"
    assert run_convert(monkeypatch, "export", "--run", run, "--out", out, "--push-to-hub", "a/b/c") == 2
    assert "error: --push-to-hub a/b/c: should be like name or user/name" in capsys.readouterr().err
    assert not out.exists()


def test_the_card_shows_what_training_drew_last_and_the_summary_says_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = make_run(tmp_path)
    (run / "samples").mkdir(exist_ok=True)
    for step, colour in ((1, "red"), (2, "blue"), (10**9, "green")):  # the last one is of weights that came later
        Image.new("RGB", (8, 8), colour).save(run / "samples" / f"step-{step:08d}.png")
    out = export(monkeypatch, run)
    assert "![Samples](samples.png)" in (out / "README.md").read_text()
    assert Image.open(out / "samples.png").getpixel((0, 0)) == (0, 0, 255)
    said = capsys.readouterr().out
    assert f"exported to {out}" in said
    assert "step-00000002.png" in said
    assert "samples.png (" in said


def test_a_grid_is_any_picture_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = make_run(tmp_path)
    out = tmp_path / "out"
    (tmp_path / "text.png").write_text("none")
    assert run_convert(monkeypatch, "export", "--run", run, "--out", out, "--grid", tmp_path / "text.png") == 2
    assert "text.png: not an image that can be read" in capsys.readouterr().err
    assert not out.exists()
    Image.new("L", (8, 8), 7).save(tmp_path / "mine.jpg")
    assert run_convert(monkeypatch, "export", "--run", run, "--out", out, "--grid", tmp_path / "mine.jpg") == 0
    assert Image.open(out / "samples.png").size == (8, 8)
