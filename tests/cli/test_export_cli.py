"""`vlactl export` from a run on disk to a directory that is a policy again, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vlactl.cli import exporting
from vlactl.cli.app import main
from vlactl.cli.exporting import Request, _lock, find_request, model_card
from vlactl.cli.policies import find_policy
from vlactl.config.compose import compose, dump
from vlactl.config.run import CheckpointConfig
from vlactl.distributed.roles import World
from vlactl.errors import ConfigError
from vlactl.export import check_space, num_bytes
from vlactl.hub.manifest import MANIFEST
from vlactl.launch.plan import environment_spec
from vlactl.launch.rundir import CONFIG, EXPORTED_CONFIG, PROVENANCE
from vlactl.parts import build_policy
from vlactl.report.atomic import write_json
from vlactl.train.optim import make_optimizer
from vlactl.train.saving import Checkpoints

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
PRESET = "libero_spatial_tiny_grpo"
CPU = torch.device("cpu")
WORLD = World.alone(CPU)
PRIVATE = "secretive_person"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / PRIVATE
    place.mkdir()
    monkeypatch.chdir(place)


def make_run(preset: str = PRESET, *overrides: str) -> tuple[Path, torch.nn.Module]:
    """A run with a checkpoint after two steps, and the module that is in it."""
    path = Path("runs", preset, "2026-01-01T00-00-00").absolute()
    composed = compose(preset, overrides)
    config = composed.config
    write_json(path / CONFIG, dump(config))
    write_json(path / PROVENANCE, dict(composed.provenance))
    policy = build_policy(config, environment_spec(config), CPU, for_training=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 20)
    optimizer = make_optimizer(policy.trainable(), config.optim)
    checkpoints = Checkpoints(
        path,
        policy.module,
        optimizer,
        WORLD,
        CheckpointConfig(keep=1),
        trained_only=config.lora.rank > 0,
    )
    checkpoints.save(2, now=True)
    return path, policy.module


def says(capsys, *arguments: str | Path) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def rebuilt(*overrides: str) -> torch.nn.Module:
    config = compose(PRESET, overrides).config
    return build_policy(config, environment_spec(config), CPU, for_training=False).module


def assert_same_state(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    first, second = actual.state_dict(), expected.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in second)


# --------------------------------------------------------------------------------------------
# From a run to a policy
# --------------------------------------------------------------------------------------------
def test_the_newest_run_is_exported_and_its_directory_again(capsys):
    _, module = make_run()
    code, out, err = says(capsys, "export", "--out", "there")
    assert (code, err) == (0, "")
    assert "vlactl eval --model there\n" in out
    assert f"vlactl train --preset {PRESET} --set model.path=there\n" in out
    assert_same_state(rebuilt("model.path=there"), module)
    assert all(PRIVATE.encode() not in path.read_bytes() for path in Path("there").iterdir())
    itself = find_policy(Path("there"), None, Path("runs"), ["train.dtype=float32"])
    assert_same_state(
        build_policy(
            itself.config, environment_spec(itself.config), CPU, for_training=False
        ).module,
        module,
    )
    Path("rounded").mkdir()
    options = ["--preset", PRESET, "--dtype", "bfloat16", "--out", "rounded"]
    assert says(capsys, "export", "there", *options)[0] == 0
    rounded = rebuilt("model.path=rounded", "train.dtype=bfloat16")
    assert_same_state(rounded, module.to(torch.bfloat16))
    assert {path.name for path in Path().iterdir()} == {"runs", "there", "rounded"}


def test_adapters_of_a_run(capsys):
    run, module = make_run(PRESET, "lora.rank=4")
    assert says(capsys, "export", run / "checkpoints" / "step-000002", "--out", "whole")[0] == 0
    code, out, _ = says(capsys, "export", run, "--out", "adapter", "--adapter-only")
    assert code == 0
    assert "--set lora.adapter=adapter --set lora.rank=4" in out
    assert_same_state(rebuilt("lora.rank=4", "lora.adapter=adapter"), module)
    assert find_policy(Path("whole"), None, Path("runs"), []).config.lora.rank == 0
    assert not Path("adapter", EXPORTED_CONFIG).exists()
    merged = rebuilt("model.path=whole").state_dict()
    assert merged.keys() == rebuilt().state_dict().keys()


# --------------------------------------------------------------------------------------------
# What is said about it
# --------------------------------------------------------------------------------------------
def request_for(source: Path | None = None, **options: Any) -> Request:
    defaults = {
        "preset": None,
        "dtype": None,
        "adapter_only": False,
        "overrides": [],
        "runs_dir": None,
    }
    return find_request(source, **defaults | options)


def test_the_model_card():
    run, _ = make_run(PRESET, "model.max_prompt_length=40", 'model.cameras=["wrist"]')
    text = model_card(request_for(run))
    assert text.isascii()
    assert f"| run | {PRESET} 2026-01-01T00-00-00 |\n| steps | 2 |" in text
    assert f"| preset | {PRESET} |" in text
    settings = "--set 'model.cameras=[\"wrist\"]' --set model.max_prompt_length=40"
    assert "vlactl eval --model DIR\n" in text
    assert f"vlactl train --preset {PRESET} --set model.path=DIR {settings}\n" in text
    assert PRIVATE not in text


def test_the_card_names_the_model_that_training_started_from():
    def card(*overrides: str) -> str:
        return model_card(request_for(preset=PRESET, overrides=overrides))

    Path("my-base").mkdir()
    assert "base_model" not in card()
    assert "started from | random weights" in card()
    named = card(f"model.path={Path('my-base').absolute()}")
    assert "started from | my-base |" in named
    assert PRIVATE not in named


def test_a_run_of_a_persons_own_preset_is_used_with_that_file():
    Path("mine.toml").write_text(f'summary = "mine"\nextends = ["{PRESET}"]\n')
    make_run("mine.toml")
    assert request_for().preset == "mine.toml"


@pytest.mark.parametrize("text", [None, "{", "[]", '{"summary": "default"}'])
def test_a_run_without_provenance_leaves_the_preset_open(text):
    run, _ = make_run()
    (run / PROVENANCE).unlink()
    if text is not None:
        (run / PROVENANCE).write_text(text)
    assert "vlactl train --preset NAME --set model.path=DIR\n" in model_card(request_for())


# --------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--out", "out"), "no run with a checkpoint"),
        (("nowhere", "--out", "out"), "neither a run, nor a checkpoint"),
        (("--preset", "no_such", "--out", "out"), "no_such"),
        (("--preset", PRESET), "--out"),
        (("--preset", PRESET, "--out", "out", "--adapter-only"), "no adapters"),
        (("--preset", PRESET, "--out", "out", "--dtype", "int3"), "(from --dtype)"),
        (("--preset", PRESET, "--out", "out", "--set", "model.path=gone"), "no directory gone"),
        (("--preset", PRESET, "--out", "."), "current directory"),
    ],
)
def test_what_cannot_be_exported(capsys, arguments, expected):
    Path("mine").touch()
    code, _, err = says(capsys, "export", *arguments)
    assert code == 2
    assert expected in err
    assert [path.name for path in Path().iterdir()] == ["mine"]


def test_a_damaged_checkpoint_is_refused(capsys):
    run, _ = make_run()
    manifest = run / "checkpoints" / "step-000002" / MANIFEST
    manifest.write_text("{}")
    code, _, err = says(capsys, "export", run, "--out", "out")
    assert code == 2
    assert "no complete checkpoint" in err


def test_what_the_process_refuses(capsys):
    Path("model").mkdir()
    Path("model", "model.safetensors").write_bytes(b"damaged")
    code, _, err = says(capsys, "export", "model", "--preset", PRESET, "--out", "out")
    assert code == 5
    assert "model.safetensors is damaged" in err
    assert [path.name for path in Path().iterdir()] == ["model"]


def test_a_place_that_is_in_use_or_a_mount_point_is_refused(capsys):
    code, _, err = says(capsys, "export", "--preset", PRESET, "--out", "/proc")
    assert (code, "mount point" in err) == (2, True)
    with _lock(Path("out").resolve()):
        code, _, err = says(capsys, "export", "--preset", PRESET, "--out", "out")
    assert (code, "another process" in err) == (2, True)
    assert list(Path().iterdir()) == []


def test_the_target_of_a_link_is_written_and_what_a_killed_export_left_is_removed(
    capsys, monkeypatch
):
    monkeypatch.setattr(exporting, "_run", lambda _, staging: (staging / "weights").touch())
    Path("disk", ".real.partial").mkdir(parents=True)
    Path("disk", ".real.partial", "old").touch()
    Path("link").symlink_to("disk/real")
    assert says(capsys, "export", "--preset", PRESET, "--out", "link")[0] == 0
    assert Path("link").is_symlink()
    assert [path.name for path in Path("disk").iterdir()] == ["real"]
    assert {path.name for path in Path("disk/real").iterdir()} == {
        "README.md",
        "vlactl_config.json",
        "weights",
    }


def test_a_full_disk(tmp_path):
    module = torch.nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    assert num_bytes(module, trained_only=False) == 8 * 4
    assert num_bytes(module, trained_only=True) == 6 * 4
    check_space(tmp_path, 1)
    with pytest.raises(ConfigError, match=r"takes 1000000\.0 GB"):
        check_space(tmp_path, 10**15)
