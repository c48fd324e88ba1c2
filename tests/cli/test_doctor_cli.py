"""`vlactl doctor`: a line per finding, a fix per failure, and no torch."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vlactl.api.plugins import Finding
from vlactl.cli.app import main
from vlactl.config.compose import compose
from vlactl.launch.doctor import Diagnosis

FakeDistribution = Callable[..., Path]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_line_per_finding(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for subject in ("python 3.", "torch ", "machine ", "/dev/shm ", "disk ", "ffmpeg "):
        assert f" ok    {subject}" in text
    assert "environment toy" in text
    assert text.isascii()


def test_a_preset_that_can_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--preset", "toy_grpo"]) == 0
    assert "toy_grpo can run here: vlactl train --preset toy_grpo" in capsys.readouterr().out


def test_the_model_of_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLACTL_HOME", str(tmp_path / "home"))
    assert main(["doctor", "--preset", "libero_130_grpo"]) == 3
    missing = "the model RLinf/RLinf-OpenVLAOFT-LIBERO-130-Base-Lora is not here: vlactl download"
    assert missing in capsys.readouterr().out
    mine = tmp_path / "mine.toml"
    mine.write_text(f'extends = ["libero_130_grpo"]\n[model]\npath = "{tmp_path}"\n')
    main(["doctor", "--preset", str(mine)])
    text = capsys.readouterr().out
    assert f" ok    model {tmp_path}" in text
    assert "is not here" not in text


def test_json_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--preset", "toy_grpo", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ready"] is True
    assert {"level", "subject", "detail", "fix", "plugin"} == set(report["findings"][0])


def test_a_failure_concerns_the_presets_that_use_its_plugin() -> None:
    config = compose("toy_grpo").config
    finding = Finding(level="FAIL", subject="x")
    assert Diagnosis(finding=finding).concerns(config)
    assert Diagnosis(finding=finding, plugin="environment toy").concerns(config)
    assert Diagnosis(finding=finding, plugin="sink tensorboard").concerns(config)
    assert not Diagnosis(finding=finding, plugin="environment libero").concerns(config)


def test_a_failure_of_the_preset_exits_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A distribution registers a second sink "tensorboard": ambiguous for every preset."""
    info = tmp_path / "twin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: twin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vlactl.sinks]\ntensorboard = twin:PLUGIN\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["doctor", "--preset", "toy_grpo"]) == 3
    text = capsys.readouterr().out
    assert " FAIL  sink tensorboard duplicate" in text
    assert "toy_grpo cannot run here yet" in text
    assert main(["doctor", "--preset", "toy_grpo", "--set", "x"]) == 2


def test_a_mirror_that_is_not_installed_fails_where_it_is_wanted(
    fake_distribution: FakeDistribution, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_distribution(
        "vlactl-far",
        {"vlactl.sinks": {"far": "far_sink:PLUGIN"}},
        {
            "far_sink.py": """
            from vlactl.api.plugins import PluginConfig, Requirement, SinkPlugin
            PLUGIN = SinkPlugin(
                name="far", summary="far away", config=PluginConfig, factory="far_sink:make",
                api_version=1,
                requirements=(
                    Requirement(distribution="far-away", install="pip install far-away"),
                ),
            )
            """
        },
    )
    assert main(["doctor"]) == 0
    assert " warn  sink far missing: far-away" in capsys.readouterr().out
    mine = tmp_path / "mine.toml"
    mine.write_text('extends = ["toy_grpo"]\nsinks = ["far"]\n')
    assert main(["doctor", "--preset", str(mine)]) == 3
    assert " FAIL  sink far missing: far-away" in capsys.readouterr().out
    assert main(["train", "--preset", str(mine), "--run-dir", "run"]) == 3
    assert "pip install far-away" in capsys.readouterr().err
    assert not Path("run").exists()


def test_nothing_heavy_is_imported() -> None:
    program = (
        "import sys; from vlactl.cli.app import main; main(['doctor']);"
        "heavy = {'torch', 'transformers', 'mujoco', 'gymnasium'} & set(sys.modules);"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
