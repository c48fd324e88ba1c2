"""`vlactl download` without a network, and how training and evaluation find what it brought."""

from __future__ import annotations

import json

import pytest

from vlactl.cli.app import main
from vlactl.cli.policies import find_policy
from vlactl.cli.training import find_request
from vlactl.hub import models
from vlactl.hub.manifest import MANIFEST, write_manifest

CHECKPOINT = "Haozhan72/Openvla-oft-SFT-libero10-traj1"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty working directory, with no models, on a machine without GPUs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("VLACTL_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("VLACTL_RUNS", raising=False)


def install(repo, commit="c" * 40, downloaded="2026-01-01T00:00:00+00:00"):
    """Put a directory there as a download would."""
    directory = models.folder(repo) / commit
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"weights")
    header = {"repo": repo, "commit": commit, "revision": "main", "licence": "l", "sha256": {}}
    write_manifest(directory, header | {"downloaded": downloaded})
    return directory


def test_alone_it_lists(capsys):
    install(CHECKPOINT)
    install("my/own")
    assert main(["download"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "Llama 2 Community License" in lines[1]
    here = next(line for line in lines if CHECKPOINT in line)
    for expected in ("15.1 GB", "unpinned", " yes ", "LIBERO-10"):
        assert expected in here
    assert any("my/own" in line and "not in the catalogue" in line for line in lines)
    assert " yes " not in next(line for line in lines if "openvla/openvla-7b " in line)


def test_a_manifest_without_a_licence_is_listed(capsys):
    directory = install("my/own")
    manifest = json.loads((directory / MANIFEST).read_text())
    del manifest["licence"]
    (directory / MANIFEST).write_text(json.dumps(manifest))
    assert main(["download"]) == 0
    assert "none is stated" in capsys.readouterr().out


def test_list_for_machines(capsys):
    directory = install(CHECKPOINT)
    assert main(["download", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows[CHECKPOINT]["path"] == str(directory)
    assert rows["openvla/openvla-7b"]["path"] is None
    assert rows["openvla/openvla-7b"]["revision"] == ""


def test_a_preset_names_its_model(capsys):
    assert main(["download", "--preset", "libero_10_grpo", "--offline"]) == 3
    assert f"vlactl download {CHECKPOINT}" in capsys.readouterr().err
    directory = install(CHECKPOINT)
    assert main(["download", "--preset", "libero_10_grpo", "--offline"]) == 0
    assert str(directory) in capsys.readouterr().out
    assert main(["download", "--preset", "libero_10_tiny_grpo"]) == 2
    assert "needs no download" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "neither a model of the catalogue"),
        (["openvla-7"], "did you mean openvla/openvla-7b"),
        (["a/b", "c/d", "--dest", "x"], "exactly one model"),
        (["a/b", "--endpoint", "mirror.example"], "is not the address of a hub"),
        (["a/b", "--endpoint", "https://user:word@mirror.example"], "is not the address of a hub"),
        (["--preset", "nothing_like_it"], "unknown preset"),
    ],
)
def test_mistakes(arguments, message, capsys):
    assert main(["download", *arguments]) == 2
    assert message in capsys.readouterr().err


# --------------------------------------------------------------------------------------------
# What runs make of it
# --------------------------------------------------------------------------------------------
def test_training_names_the_command_that_gets_the_model(tmp_path, capsys):
    assert main(["train", "--preset", "libero_10_grpo"]) == 2
    text = capsys.readouterr().err
    assert f"the model {CHECKPOINT} is not here: vlactl download {CHECKPOINT}" in text
    assert list(tmp_path.iterdir()) == []
    assert main(["train", "--preset", "libero_10_grpo", "--gpus", "8", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert f" blocked   the model {CHECKPOINT} is not here" in text
    assert "per step" in text


def test_training_uses_what_is_here(tmp_path, capsys):
    directory = install(CHECKPOINT)
    request = find_request("libero_10_grpo", [], None, tmp_path / "runs", None)
    assert request.config.model.path == str(directory)
    assert request.provenance["model.path"] == "vlactl download"
    assert main(["train", "--preset", "libero_10_grpo", "--gpus", "8", "--dry-run"]) == 0
    assert "is not here" not in capsys.readouterr().out


def test_a_path_of_the_users_own_wins(tmp_path):
    install(CHECKPOINT)
    (tmp_path / "mine").mkdir()
    request = find_request("libero_10_grpo", ["model.path=mine"], None, tmp_path / "runs", None)
    assert request.config.model.path == str(tmp_path / "mine")  # from wherever the run goes on
    assert request.provenance["model.path"] == "--set"


def test_small_models_take_no_download(tmp_path):
    install(CHECKPOINT)
    for sets in (["model.size=tiny"], [f"model.checkpoint={CHECKPOINT}"]):
        preset = "libero_10_grpo" if len(sets[0]) < 20 else "libero_10_tiny_grpo"
        assert find_request(preset, sets, None, tmp_path / "runs", None).config.model.path == ""


def test_a_damaged_download_is_not_used(tmp_path):
    directory = install(CHECKPOINT)
    (directory / "model.safetensors").write_bytes(b"cut")
    request = find_request("libero_10_grpo", [], None, tmp_path / "runs", None)
    assert request.config.model.path == ""


def test_the_newest_download_is_used_unless_a_commit_is_named():
    old = install(CHECKPOINT, "a" * 40, "2026-01-01T00:00:00+00:00")
    new = install(CHECKPOINT, "b" * 40, "2026-02-01T00:00:00+00:00")
    assert models.find(CHECKPOINT) == models.find(f"{CHECKPOINT}@main") == new
    assert models.find(f"{CHECKPOINT}@{'a' * 40}") == old


def test_evaluation_of_a_preset_uses_what_is_here(tmp_path):
    untrained = find_policy(None, "libero_10_grpo", tmp_path, [])
    assert (untrained.label, untrained.config.model.path) == (CHECKPOINT, "")
    directory = install(CHECKPOINT)
    assert find_policy(None, "libero_10_grpo", tmp_path, []).config.model.path == str(directory)


def test_a_downloaded_directory_can_be_evaluated_in_its_own_dialect(tmp_path):
    directory = install("moojink/openvla-7b-oft-finetuned-libero-10")
    source = find_policy(directory, "libero_10_grpo", tmp_path, [])
    model = source.config.model
    assert (model.path, model.head) == (str(directory), "l1")
    assert (source.checkpoint, source.label) == ("", str(directory))
