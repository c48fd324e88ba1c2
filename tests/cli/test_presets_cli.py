"""`vlactl presets` and `vlactl plugins`, as typed."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from vlactl.cli import plugins, presets
from vlactl.cli.presets import _toml_value
from vlactl.config.compose import compose, dump
from vlactl.errors import ConfigError

app = typer.Typer()
app.add_typer(presets.app, name="presets")
app.add_typer(plugins.app, name="plugins")


@pytest.fixture
def run():
    """Run a command line that is expected to succeed, and give its output."""

    def invoke(*arguments):
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert result.output.isascii()
        return result.output

    return invoke


def test_presets_alone_lists_and_teaches(run):
    output = run("presets")
    assert "libero_spatial_tiny_grpo" in output
    assert "vlactl train --preset NAME --dry-run" in output
    assert "Next:" not in run("presets", "list")


def test_presets_list_for_machines(run):
    listed = {entry["name"]: entry for entry in json.loads(run("presets", "list", "--json"))}
    assert listed["toy_grpo"]["source"] == "vlactl"
    assert listed["toy_grpo"]["summary"]


def test_show_says_where_values_come_from(run):
    lines = run("presets", "show", "libero_10_grpo", "--set", "algorithm.group_size=4").splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert rows["algorithm.group_size"] == ["4", "--set"]
    assert rows["optim.lr"][0] == "2e-05"
    assert rows["optim.lr"][1].startswith("presets/_bases/grpo.toml:")
    assert rows["train.max_restarts"] == ["2", "default"]
    assert rows["algorithm.dual_clip"][0] == "none"


@pytest.mark.parametrize("preset", ["toy_grpo", "libero_10_grpo", "libero_90_ppo_qlora"])
def test_show_as_toml_is_a_preset_again(run, preset, tmp_path):
    path = tmp_path / "again.toml"
    path.write_text(run("presets", "show", preset, "--format", "toml", "--provenance"))
    assert compose(str(path)).config == compose(preset).config


def test_toml_text_survives():
    assert _toml_value('a"\\\n\x7f') == '"a\\"\\\\\\n\\u007f"'


def test_show_as_json(run):
    assert json.loads(run("presets", "show", "toy_grpo", "--format", "json")) == dump(
        compose("toy_grpo").config
    )
    detailed = json.loads(run("presets", "show", "toy_grpo", "--format", "json", "--provenance"))
    assert detailed["train.seed"] == {"value": 1234, "from": "default"}


def test_diff_shows_what_differs(run):
    lines = run("presets", "diff", "libero_10_grpo", "libero_10_grpo_lora").splitlines()
    assert " ~ lora.rank                  0 -> 32" in lines
    assert not any("summary" in line or "run_name" in line for line in lines)
    assert "no difference" in run("presets", "diff", "toy_grpo", "toy-grpo")
    changes = json.loads(run("presets", "diff", "toy_grpo", "libero_10_grpo", "--json"))
    assert changes["env.suite"] == {"before": "toy", "after": "libero_10"}


def test_schema_is_the_checked_in_one(run, pytestconfig):
    checked_in = pytestconfig.rootpath / "presets/schema.json"
    fresh = run("presets", "schema", "--built-in")
    assert json.loads(fresh) == json.loads(checked_in.read_text()), (
        "run: vlactl presets schema --built-in > presets/schema.json"
    )


def test_schema_knows_every_section(run):
    schema = json.loads(run("presets", "schema"))
    assert {"extends", "env", "model", "algorithm", "optim", "run_name"} <= schema[
        "properties"
    ].keys()
    references = {entry["$ref"].split("/")[-1] for entry in schema["properties"]["env"]["anyOf"]}
    assert {"LiberoConfig", "ToyEnvConfig"} <= references <= schema["$defs"].keys()


def test_errors_leave_as_user_errors():
    with pytest.raises(ConfigError, match="unknown preset"):
        CliRunner().invoke(app, ["presets", "show", "nope"], catch_exceptions=False)


def test_plugins_list(run):
    assert "VLACTL_PLUGINS" in run("plugins")
    output = run("plugins", "list")
    assert output.split()[:5] == ["kind", "name", "version", "source", "status"]
    assert "vlactl (built-in)" in output
    [record] = [
        record
        for record in json.loads(run("plugins", "list", "--json"))
        if (record["kind"], record["name"]) == ("algorithm", "grpo")
    ]
    assert record["module"] == "vlactl_grpo.plugin:PLUGIN"
    assert record["status"] == "ok"


def test_plugins_list_survives_a_broken_one(run, fake_distribution):
    fake_distribution(
        "broken-dist", {"vlactl.models": {"broken": "broken_cli:X"}}, {"broken_cli.py": "1 / 0"}
    )
    assert "broken: ZeroDivisionError" in run("plugins", "list")
    result = CliRunner().invoke(app, ["plugins", "check", "broken"], catch_exceptions=False)
    assert result.exit_code == 3
    assert "FAIL" in result.output


def test_plugins_check(run):
    assert "imports nothing heavy" in run("plugins", "check", "grpo")
    with pytest.raises(ConfigError, match='no plugin is called "gppo"'):
        CliRunner().invoke(app, ["plugins", "check", "gppo"], catch_exceptions=False)
