"""Downloads from a local server that imitates the hub, and misbehaves in all known ways."""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

from vlactl.cli.app import main
from vlactl.hub import download as transfer
from vlactl.hub import models, remote
from vlactl.hub.manifest import MANIFEST, is_complete

REPO = "owner/model"
COMMIT = "0123456789abcdef" * 2 + "01234567"
WEIGHTS = "model-00001-of-00002.safetensors"
TOKEN = "hf_secret_of_this_test"
FILES = {
    WEIGHTS: bytes(range(256)) * 4000,
    "model-00002-of-00002.safetensors": b"second" * 3000,
    "config.json": b'{"model_type": "openvla"}',
    "tokenizer.model": b"words",
    "modeling_prismatic.py": b"import os; os.abort()",
    "pytorch_model.bin": b"pickle",
    "README.md": b"# model",
    "MANIFEST.json": b"{}",
    "lora_adapter/adapter_model.safetensors": b"not of the top folder",
}
EXPECTED = {WEIGHTS, "model-00002-of-00002.safetensors", "config.json", "tokenizer.model"}


@dataclass
class Hub:
    """What the server has, how it misbehaves, and what it was asked."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    served: dict[str, bytes] = field(default_factory=dict)
    """Files with another content than announced."""
    refusals: dict[str, list[tuple[int, dict[str, str]]]] = field(default_factory=dict)
    """By "api" or file: answers to the next requests."""
    cuts: dict[str, list[int]] = field(default_factory=dict)
    """By file: bytes after which the next connections break."""
    licence: str = "mit"
    knows_ranges: bool = True
    block_seconds: float = 0.0
    gate: threading.Event = field(default_factory=threading.Event)
    """Content waits for it."""
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def asked(self, part: str) -> list[dict[str, str]]:
        return [headers for path, headers in self.requests if part in path]

    def ranges(self, file: str) -> list[str]:
        """Of the requests that content answered."""
        return [each.get("range", "") for each in self.asked(f"/cdn/{file}")]


def describe(name: str, content: bytes) -> dict[str, object]:
    sha1 = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    entry = {"rfilename": name, "size": len(content), "blobId": sha1}
    if name.endswith((".safetensors", ".bin", ".pt")):
        entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    return entry


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((path, {k.lower(): v for k, v in self.headers.items()}))
        kind = "api" if path.startswith("/api/") else path.rpartition("/")[2]
        if not path.startswith("/cdn/") and self.hub.refusals.get(kind):
            status, headers = self.hub.refusals[kind].pop(0)
            return self.answer(status, b"{}", headers)
        if path == f"/api/models/{REPO}/revision/main":
            return self.answer(200, self.listing())
        if path == f"/api/models/{REPO}/revision/{COMMIT}":
            return self.answer(200, self.listing())
        if path.startswith(f"/api/models/{REPO}/"):
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if path == f"/{REPO}/resolve/{COMMIT}/{kind}":
            host = f"localhost:{self.server.server_port}"
            return self.answer(302, b"", {"Location": f"http://{host}/cdn/{kind}"})
        if path.startswith("/cdn/"):
            return self.content(kind)
        return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def listing(self) -> bytes:
        siblings = [describe(name, content) for name, content in self.hub.files.items()]
        card = {"license": self.hub.licence}
        return json.dumps(
            {"id": REPO, "sha": COMMIT, "cardData": card, "siblings": siblings}
        ).encode()

    def content(self, name: str) -> None:
        body = self.hub.served.get(name, self.hub.files[name])
        wanted = self.headers.get("Range")
        start = int(wanted[len("bytes=") : -1]) if wanted and self.hub.knows_ranges else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        self.hub.gate.wait(60)
        cuts = self.hub.cuts.get(name)
        end = start + cuts.pop(0) if cuts else len(body)
        for offset in range(start, min(end, len(body)), 16384):
            self.wfile.write(body[offset : min(offset + 16384, end)])
            self.wfile.flush()
            time.sleep(self.hub.block_seconds)
        self.close_connection = end < len(body)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError):
            super().handle()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server, and an environment in which nothing was downloaded yet."""
    for variable in ("HF_TOKEN", "HF_ENDPOINT", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("VLACTL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(transfer, "BACK_OFF_SECONDS", (0.01, 0.02))
    state = Hub()
    state.gate.set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": state}))
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield state
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()
    thread.join()


def get(hub: Hub, *arguments: str) -> int:
    return main(["download", REPO, "--endpoint", hub.url, *arguments])


def command(hub: Hub) -> list[str]:
    return [sys.executable, "-m", "vlactl.cli.app", "download", REPO, "--endpoint", hub.url]


def place() -> Path:
    return models.folder(REPO) / COMMIT


def partial() -> Path:
    return models.folder(REPO) / f"{COMMIT}.partial"


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


# --------------------------------------------------------------------------------------------
# What goes well
# --------------------------------------------------------------------------------------------
def test_a_model_is_described_loaded_and_checked(hub, capsys):
    assert get(hub) == 0
    out = capsys.readouterr().out
    for expected in (REPO, hub.url, COMMIT, "not pinned", "mit", "1.0 MB in 4 files", " free)"):
        assert expected in out
    assert {path.name for path in place().iterdir()} == EXPECTED | {MANIFEST}
    assert all((place() / name).read_bytes() == FILES[name] for name in EXPECTED)
    manifest = json.loads((place() / MANIFEST).read_text())
    assert (manifest["repo"], manifest["commit"]) == (REPO, COMMIT)
    assert manifest["sha256"][WEIGHTS] == hashlib.sha256(FILES[WEIGHTS]).hexdigest()
    assert models.find(REPO) == models.find(f"{REPO}@{COMMIT}") == place()
    assert models.find(f"{REPO}@{'f' * 40}") is None
    assert not partial().exists()


def test_what_a_page_says_cannot_steer_the_terminal(hub, capsys):
    hub.licence = "mit\x1b[2J\u202e"
    assert get(hub) == 0
    assert "licence  mit?[2J?" in capsys.readouterr().out


def test_code_and_pickles_are_not_even_asked_for(hub):
    assert get(hub) == 0
    asked = {path.rpartition("/")[2] for path, _ in hub.requests if "/resolve/" in path}
    assert asked == EXPECTED


def test_what_is_here_needs_no_network(hub, capsys):
    assert get(hub) == 0
    hub.requests.clear()
    assert get(hub) == 0
    assert get(hub, "--offline") == 0
    assert main(["download", f"{REPO}@{COMMIT}", "--endpoint", "http://127.0.0.1:1"]) == 0
    assert hub.requests == []
    assert " here " in capsys.readouterr().out


def test_a_branch_is_looked_up_again_but_not_loaded_again(hub):
    assert get(hub) == 0
    hub.requests.clear()
    assert main(["download", f"{REPO}@main", "--endpoint", hub.url]) == 0
    assert len(hub.requests) == 1
    assert main(["download", f"{REPO}@main", "--offline"]) == 0


def test_a_folder_of_its_own(hub, tmp_path, capsys):
    there = tmp_path / "mine"
    assert get(hub, "--dest", str(there)) == 0
    assert f"--set model.path={there}" in capsys.readouterr().out
    assert is_complete(there)
    assert models.find(REPO) is None
    assert get(hub, "--dest", str(there), "--offline") == 0
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    assert get(hub, "--dest", str(tmp_path / "taken")) == 2
    assert "is not this model" in error_of(capsys)


def test_the_token_goes_to_the_hub_only_and_is_never_shown(hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.refusals[WEIGHTS] = [(403, {})]
    assert get(hub) == 3
    assert get(hub) == 0
    assert {each.get("authorization") for each in hub.asked("/api/")} == {f"Bearer {TOKEN}"}
    assert not any("authorization" in each for each in hub.asked("/cdn/"))
    text = "".join(capsys.readouterr()) + (place() / MANIFEST).read_text()
    assert TOKEN not in text
    agents = {each["user-agent"].partition("/")[0] for _, each in hub.requests}
    assert agents == {"vlactl"}


@pytest.mark.parametrize(
    ("endpoint", "goes"),
    [
        ("https://huggingface.co", True),
        ("https://mirror.example", True),
        ("http://localhost:8000", True),
        ("http://mirror.example", False),
        ("http://localhost.mirror.example", False),
    ],
)
def test_the_token_never_goes_over_plain_http(hub, monkeypatch, endpoint, goes):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert ("Authorization" in remote.headers(endpoint)) is goes


def test_an_empty_file_is_created_too(hub):
    hub.files["empty.json"] = b""
    assert get(hub) == 0
    assert (place() / "empty.json").read_bytes() == b""


def test_a_file_that_is_listed_twice_is_loaded_once(hub, monkeypatch):
    twice = [describe(WEIGHTS, FILES[WEIGHTS])] * 2
    answer = json.dumps({"sha": COMMIT, "siblings": twice}).encode()
    monkeypatch.setattr(Handler, "listing", lambda _: answer)
    assert get(hub) == 0
    assert hub.ranges(WEIGHTS) == [""]


@pytest.mark.parametrize(
    "wrong",
    [{"lfs": [1]}, {"lfs": {"sha256": 1}}, {"size": -1}, {"size": "many"}, {"blobId": None}],
)
def test_a_malformed_listing(hub, monkeypatch, capsys, wrong):
    file = describe("config.json", b"{}") | wrong
    answer = json.dumps({"sha": COMMIT, "siblings": [file]}).encode()
    monkeypatch.setattr(Handler, "listing", lambda _: answer)
    assert get(hub) == 3
    assert "does not answer as the hub does" in error_of(capsys)


def test_a_link_is_followed_and_unfit_places_are_refused_at_once(
    hub, tmp_path, monkeypatch, capsys
):
    (tmp_path / "link").symlink_to("real")
    assert get(hub, "--dest", str(tmp_path / "link")) == 0
    assert (tmp_path / "link").is_symlink()
    assert is_complete(tmp_path / "real")
    hub.requests.clear()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for unfit in (".", "/proc"):
        assert get(hub, "--dest", unfit) == 2
        assert "mount point or the current directory" in error_of(capsys)
    assert hub.requests == []


def test_json(hub, capsys):
    assert get(hub, "--json") == 0
    out = json.loads(capsys.readouterr().out)
    assert out == [{"name": REPO, "revision": COMMIT, "path": str(place())}]


def test_extra_files_of_the_catalogue(hub, tmp_path, fake_distribution):
    hub.files |= {"action_head--9_checkpoint.pt": b"head", "other--9_checkpoint.pt": b"other"}
    fake_distribution(
        "heads",
        {"vlactl.presets": {"h": "heads"}},
        {
            "heads/__init__.py": "",
            "heads/presets/_models.toml": f"""
                ["{REPO}"]
                summary = "with a head"
                licence = "ours"
                size = 1
                also = ["action_head--*_checkpoint.pt"]
                """,
        },
    )
    assert get(hub) == 0
    assert {path.name for path in place().glob("*.pt")} == {"action_head--9_checkpoint.pt"}


def test_what_the_catalogue_pins_is_what_counts(hub, fake_distribution, capsys):
    fake_distribution(
        "pins",
        {"vlactl.presets": {"p": "pins"}},
        {
            "pins/__init__.py": "",
            "pins/presets/_models.toml": f"""
                ["{REPO}"]
                summary = "pinned"
                licence = "ours"
                size = 1
                revision = "{COMMIT}"
                sha256 = {{ "{WEIGHTS}" = "{"0" * 64}" }}
                """,
        },
    )
    assert get(hub) == 5
    text = "".join(capsys.readouterr())
    assert "not pinned" not in text
    assert "0" * 64 in text


# --------------------------------------------------------------------------------------------
# Interruptions
# --------------------------------------------------------------------------------------------
def test_a_cut_is_survived_by_going_on(hub, capsys):
    hub.cuts[WEIGHTS] = [300_000, 1, 1, 100_000]
    assert get(hub) == 0
    assert "again in" in capsys.readouterr().out
    assert hub.ranges(WEIGHTS) == [
        "",
        "bytes=300000-",
        "bytes=300001-",
        "bytes=300002-",
        "bytes=400002-",
    ]
    assert is_complete(place())


def test_a_server_that_cannot_go_on_starts_anew(hub):
    hub.knows_ranges = False
    hub.cuts[WEIGHTS] = [300_000]
    assert get(hub) == 0
    assert (place() / WEIGHTS).read_bytes() == FILES[WEIGHTS]


def test_a_connection_that_stays_broken(hub, capsys):
    hub.cuts[WEIGHTS] = [300_000, *[0] * 20]
    assert get(hub) == 3
    text = error_of(capsys)
    assert WEIGHTS in text
    assert "goes on where it stopped" in text
    assert (partial() / WEIGHTS).stat().st_size == 300_000
    assert not place().exists()
    assert models.find(REPO) is None
    del hub.cuts[WEIGHTS]
    hub.requests.clear()
    assert get(hub) == 0
    assert "kB of it here already" in capsys.readouterr().out
    assert hub.ranges(WEIGHTS) == ["bytes=300000-"]


def test_kill_in_the_middle_then_resume(hub):
    hub.block_seconds = 0.01
    process = subprocess.Popen(command(hub), stdout=subprocess.DEVNULL)
    weights = partial() / WEIGHTS
    wait_until(lambda: weights.exists() and weights.stat().st_size > 100_000)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not place().exists()
    assert models.find(REPO) is None
    begun = weights.stat().st_size
    assert 0 < begun < len(FILES[WEIGHTS])
    hub.block_seconds = 0.0
    hub.requests.clear()
    assert get(hub) == 0
    assert hub.ranges(WEIGHTS) == [f"bytes={begun}-"]
    assert (place() / WEIGHTS).read_bytes() == FILES[WEIGHTS]


def test_two_processes_at_once(hub):
    hub.gate.clear()
    first = subprocess.Popen(command(hub), stdout=subprocess.DEVNULL)
    wait_until(partial().is_dir)
    second = subprocess.Popen(command(hub), stdout=subprocess.PIPE, text=True)
    assert "waiting for it" in second.stdout.readline()
    hub.gate.set()
    rest, _ = second.communicate(timeout=60)
    assert (first.wait(timeout=60), second.returncode) == (0, 0)
    assert " here " in rest
    assert hub.ranges(WEIGHTS) == [""]
    assert (place() / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    assert is_complete(place())


def test_ctrl_c_keeps_what_is_here(hub):
    hub.block_seconds = 0.01
    process = subprocess.Popen(command(hub), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_until((partial() / WEIGHTS).exists)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=30)
    assert process.returncode == 130
    assert text.decode().strip() == "error: interrupted"
    assert partial().is_dir()
    assert not place().exists()


# --------------------------------------------------------------------------------------------
# Refusals
# --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("status", [401, 403])
def test_private_or_gated(hub, status, capsys):
    hub.refusals["api"] = [(status, {"X-Error-Code": "GatedRepo"})]
    assert get(hub) == 3
    text = error_of(capsys)
    assert f"({status})" in text
    assert "HF_TOKEN" in text
    assert f"{hub.url}/{REPO}" in text


def test_unknown_model_and_revision(hub, capsys):
    wrong = "moojink/openvla-7b-oft-finetuned-libero-spacial"
    assert main(["download", wrong, "--endpoint", hub.url]) == 2
    text = error_of(capsys)
    assert f"there is no model {wrong}" in text
    assert "did you mean moojink/openvla-7b-oft-finetuned-libero-spatial" in text
    assert main(["download", f"{REPO}@v9", "--endpoint", hub.url]) == 2
    assert 'has no revision "v9"' in error_of(capsys)


def test_a_limit_of_requests(hub, capsys):
    hub.refusals["api"] = [(429, {"Retry-After": "77"})]
    assert get(hub) == 3
    assert "in 77 seconds" in error_of(capsys)
    hub.refusals["api"] = [(429, {"RateLimit": '"api";r=0;t=55'})]
    assert get(hub) == 3
    assert "in 55 seconds" in error_of(capsys)


def test_a_limit_is_waited_for_when_that_is_short(hub, capsys):
    hub.refusals[WEIGHTS] = [(429, {"Retry-After": "0"}), (503, {})]
    assert get(hub) == 0
    assert "the hub answers 429; again in 0 s" in capsys.readouterr().out
    assert len(hub.asked(f"/resolve/{COMMIT}/{WEIGHTS}")) == 3


def test_a_limit_in_the_middle_that_is_long(hub, capsys):
    hub.refusals[WEIGHTS] = [(429, {"Retry-After": "3600"})]
    assert get(hub) == 3
    assert "in 3600 seconds" in error_of(capsys)


def test_a_hub_with_problems(hub, capsys):
    hub.refusals["api"] = [(503, {})]
    assert get(hub) == 3
    assert "answers 503" in error_of(capsys)


def test_a_mirror_without_a_file(hub, capsys):
    hub.refusals[WEIGHTS] = [(404, {"X-Error-Code": "EntryNotFound"})]
    assert get(hub) == 3
    text = error_of(capsys)
    assert f"lists {WEIGHTS}" in text
    assert "another mirror" in text


@pytest.mark.parametrize("file", [WEIGHTS, "config.json"])
def test_a_wrong_hash(hub, file, capsys):
    content = FILES[file]
    hub.served[file] = content[:-1] + b"!"
    assert get(hub) == 5
    text = error_of(capsys)
    assert f"{file} of {REPO} is not what {hub.url} announces" in text
    assert not place().exists()
    assert not (partial() / file).exists()
    hub.served.clear()
    assert get(hub) == 0


def test_a_file_that_is_too_long(hub, capsys):
    hub.served[WEIGHTS] = FILES[WEIGHTS] + b"more"
    assert get(hub) == 5
    assert "longer" in error_of(capsys)
    assert not (partial() / WEIGHTS).exists()


def test_only_pickles(hub, capsys):
    hub.files = {"pytorch_model.bin": b"pickle", "config.json": b"{}"}
    assert get(hub) == 2
    text = error_of(capsys)
    assert "pytorch_model.bin" in text
    assert "safetensors" in text
    hub.files = {"config.json": b"{}"}
    assert get(hub) == 2
    assert "no weights" in error_of(capsys)


def test_no_network(hub, capsys):
    assert main(["download", REPO, "--endpoint", "http://127.0.0.1:9"]) == 3
    assert "cannot load owner/model from http://127.0.0.1:9" in error_of(capsys)
    assert main(["download", REPO, "--endpoint", "http://nowhere.invalid"]) == 3
    assert "nowhere.invalid" in error_of(capsys)


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b'{"sha": "../..", "siblings": []}'])
def test_something_else_than_a_hub(hub, answer, monkeypatch, capsys):
    monkeypatch.setattr(Handler, "listing", lambda _: answer)
    assert get(hub) in (2, 3)
    assert "error: " in error_of(capsys)
    assert not place().exists()


def test_not_here_and_offline(hub, capsys):
    assert get(hub, "--offline") == 3
    assert f"vlactl download {REPO}" in error_of(capsys)
    assert hub.requests == []


def test_a_full_disk_is_noticed_before(hub, monkeypatch, capsys):
    usage = type(transfer.shutil.disk_usage("/"))(10**6, 10**6 - 5, 5)
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda _: usage)
    assert get(hub) == 3
    text = error_of(capsys)
    assert "needs 1.0 MB more" in text
    assert "5 B free" in text
    assert hub.asked("/resolve/") == []


def test_a_disk_that_becomes_full(hub, capsys):
    partial().mkdir(parents=True)
    (partial() / WEIGHTS).symlink_to("/dev/full")
    assert get(hub) == 3
    text = error_of(capsys)
    assert f"the disk became full while {WEIGHTS} was loaded" in text
    assert "goes on where it stopped" in text


def test_a_place_that_cannot_be_written_to(hub, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("VLACTL_HOME", str(tmp_path / "file"))
    assert get(hub) == 3
    assert "Not a directory" in error_of(capsys)


# --------------------------------------------------------------------------------------------
# Damage
# --------------------------------------------------------------------------------------------
def test_verify_finds_a_flipped_bit_and_the_next_download_mends_it(hub, capsys):
    assert get(hub) == 0
    assert main(["download", "--verify"]) == 0
    assert WEIGHTS in capsys.readouterr().out
    with (place() / WEIGHTS).open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff\xfe")
    assert main(["download", REPO, "--verify"]) == 5
    text = error_of(capsys)
    assert WEIGHTS in text
    assert f"vlactl download {REPO}@{COMMIT}" in text
    assert models.find(REPO) is None
    hub.requests.clear()
    assert get(hub) == 0
    assert {path.rpartition("/")[2] for path, _ in hub.requests if "/cdn/" in path} == {WEIGHTS}
    assert main(["download", REPO, "--verify", "--json"]) == 0


def test_a_missing_file_makes_it_incomplete(hub):
    assert get(hub) == 0
    (place() / "config.json").unlink()
    assert models.find(REPO) is None
    assert get(hub) == 0
    assert is_complete(place())


def test_a_repair_spares_what_a_person_put_there(hub, tmp_path, capsys):
    there = tmp_path / "mine"
    assert get(hub, "--dest", str(there)) == 0
    (there / "config.json").unlink()
    (there / "notes.json").write_text("mine")
    (there / "folder").mkdir()
    assert get(hub, "--dest", str(there)) == 2
    text = error_of(capsys)
    assert "folder, notes.json" in text
    assert "empty --dest" in text
    assert (there / MANIFEST).is_file()
    assert (there / "notes.json").read_text() == "mine"
    (there / "notes.json").unlink()
    (there / "folder").rmdir()
    del hub.files["tokenizer.model"]
    assert get(hub, "--dest", str(there)) == 0
    assert is_complete(there)
    assert not (there / "tokenizer.model").exists()


def spoil(**changes: object) -> None:
    manifest = json.loads((place() / MANIFEST).read_text())
    (place() / MANIFEST).write_text(json.dumps(manifest | changes))


@pytest.mark.parametrize("leads", ["../precious", "/{}/precious", "..", "a/../../precious"])
def test_verify_deletes_nothing_outside_the_model(hub, leads):
    assert get(hub) == 0
    precious = place().parent / "precious"
    precious.write_text("mine")
    spoil(sha256={leads.format(place().parent): "0" * 64})
    assert models.read(place()) is None
    main(["download", "--verify"])
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("wrong", [{"sha256": ["a"]}, {"sha256": {"a": 1}}, {"files": []}])
def test_a_malformed_manifest_is_none(hub, wrong):
    assert get(hub) == 0
    spoil(**wrong)
    assert models.read(place()) is None
    assert main(["download"]) == main(["download", "--verify"]) == 0


def test_a_folder_in_the_place_of_a_file_is_not_deleted(hub):
    assert get(hub) == 0
    (place() / "config.json").unlink()
    (place() / "config.json").mkdir()
    assert main(["download", "--verify"]) == 5
    assert (place() / "config.json").is_dir()


def test_verify_of_nothing(hub, capsys):
    assert main(["download", "--verify"]) == 0
    assert "nothing is here yet" in capsys.readouterr().out
    assert main(["download", REPO, "--verify"]) == 2
    assert "is not here" in error_of(capsys)
