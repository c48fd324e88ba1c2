"""Presets: layers, `extends`, `--set`, provenance, and what is said when something is wrong."""

from __future__ import annotations

import contextlib
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlactl.config import presets
from vlactl.config.compose import compose, diff, dump, flatten, load_resolved, override
from vlactl.config.layers import key_lines, parse_override
from vlactl.config.run import RESUMABLE_KEYS, RunConfig
from vlactl.errors import ConfigError, IntegrityError


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write preset files into an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def write_file(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    return write_file


def message(preset, *overrides):
    with pytest.raises(ConfigError) as caught:
        compose(preset, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


# --------------------------------------------------------------------------------------------
# Layers
# --------------------------------------------------------------------------------------------
def test_precedence_and_provenance(write):
    write("shared.toml", "[optim]\nlr = 1e-3\neps = 1e-6\n")
    mine = write("mine.toml", 'extends = ["toy_grpo", "shared.toml"]\n\n[optim]\nlr = 2e-3\n')
    composed = compose(mine, ["train.seed=7"])
    assert composed.config.optim.lr == 2e-3
    assert composed.provenance["optim.lr"] == "mine.toml:4"
    assert composed.provenance["optim.eps"] == "shared.toml:3"
    assert composed.provenance["env.name"].startswith("presets/toy_grpo.toml:")
    assert composed.provenance["train.seed"] == "--set"
    assert composed.provenance["optim.clip_grad"] == "default"
    assert composed.provenance.keys() == flatten(composed.config).keys()
    assert composed.config.run_name == composed.preset == "mine"
    assert [path.name for path in composed.files] == ["toy_grpo.toml", "shared.toml", "mine.toml"]


def test_tables_merge_and_lists_replace(write):
    write("a.toml", 'extends = "toy_grpo"\n[rollout]\ntasks = [0, 1]\ntrials = [2]\n')
    rollout = compose(
        write("b.toml", 'extends = "a.toml"\n[rollout]\ntasks = [3]\n')
    ).config.rollout
    assert (rollout.tasks, rollout.trials) == ((3,), (2,))


@pytest.mark.parametrize("name", ["toy_grpo", "toy-grpo", "Toy_GRPO", " toy_grpo "])
def test_spellings_of_a_name(name):
    assert compose(name).preset == "toy_grpo"


def test_plugin_names_accept_underscores():
    assert compose("toy_grpo", ["model.name=toy"]).config.model.name == "toy"
    assert compose("libero_10_grpo", ["model.name=openvla_oft"]).config.model.name == "openvla-oft"


def test_the_shipped_split_can_be_extended(write):
    mine = write("mine.toml", 'extends = ["libero_10_grpo", "_bases/split"]')
    config = compose(mine).config
    assert config.rollout.trials == tuple(range(40))
    assert config.eval.trials == tuple(range(40, 50))


def test_lines_of_keys():
    text = (
        '# comment = 1\na = 1\nb = """\nc = 2\n"""\n[t]   # [x]\nd = [\n  1, # e = 3\n]\n'
        't2.f = 1\n"g h" = {i = 1}\n[t.u]\n\nj = 1'
    )
    lines = {"a": 2, "b": 3, "t.d": 7, "t.t2.f": 10, "t.g h.i": 11, "t.u.j": 14}
    assert key_lines(text) == lines


# --------------------------------------------------------------------------------------------
# extends
# --------------------------------------------------------------------------------------------
def test_a_cycle_is_shown_as_a_chain(write):
    write("b.toml", 'extends = "c.toml"')
    write("c.toml", 'extends = "a.toml"')
    text = message(write("a.toml", 'extends = "b.toml"'))
    assert "a.toml -> b.toml -> c.toml -> a.toml" in text


def test_a_missing_base_names_the_chain(write):
    write("sub/b.toml", 'extends = "gone.toml"')
    text = message(write("a.toml", 'extends = "sub/b.toml"'))
    assert "a.toml -> sub/b.toml -> gone.toml: there is no such file" in text
    text = message(write("n.toml", 'extends = "libero_10_grop"'))
    assert "libero_10_grop" in text
    assert "extended by n.toml" in text
    assert '"libero_10_grpo"' in text


def test_bases_stay_within_the_folder(write, tmp_path):
    write("outside.toml", "[optim]\nlr = 1.0\n")
    for entry in ("../outside.toml", "../../x.toml", str(tmp_path / "outside.toml")):
        text = message(write("folder/a.toml", f'extends = "{entry}"'))
        assert "may not lie outside" in text
        assert f"folder/a.toml -> {entry}" in text
    (tmp_path / "folder/link.toml").symlink_to(tmp_path / "outside.toml")
    assert "may not lie outside" in message(write("folder/a.toml", 'extends = "link.toml"'))


@pytest.mark.parametrize(
    "name", ["../secret", "_bases/../toy_grpo", "/etc/passwd", "", "a b", "..."]
)
def test_names_never_leave_the_preset_folders(name):
    assert "unknown preset" in message(name)


@pytest.mark.parametrize("text", ["extends = 3", "extends = [1]", "[extends]\na = 1"])
def test_extends_of_a_wrong_type(write, text):
    assert '"extends" in a.toml' in message(write("a.toml", text))


def test_unreadable_files(write, tmp_path):
    assert "does not exist" in message("nowhere.toml")
    assert "is not valid TOML" in message(write("bad.toml", "a = = 1"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    assert "is not valid TOML" in message(str(tmp_path / "binary.toml"))


def test_preset_names_of_two_distributions(fake_distribution):
    fake_distribution(
        "copycat",
        {"vlactl.presets": {"c": "copycat"}},
        {
            "copycat/__init__.py": "",
            "copycat/presets/toy_grpo.toml": "",
            "copycat/presets/own.toml": "",
        },
    )
    text = message("toy_grpo")
    assert '"vlactl" and "copycat"' in text
    assert "own" in [preset.name for preset in presets.shipped()]


# --------------------------------------------------------------------------------------------
# --set
# --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("override_text", "key", "value"),
    [
        ("optim.lr=1e-5", "optim.lr", 1e-5),
        ("optim.lr=1", "optim.lr", 1.0),
        (" optim.lr = 1e-5 ", "optim.lr", 1e-5),
        ("rollout.tasks=0-3", "rollout.tasks", [0, 1, 2, 3]),
        ("rollout.tasks=0-1,5", "rollout.tasks", [0, 1, 5]),
        ("rollout.tasks=[3, 1]", "rollout.tasks", [3, 1]),
        ("rollout.tasks=2", "rollout.tasks", [2]),
        ("rollout.tasks=none", "rollout.tasks", None),
        ("lora.alpha=none", "lora.alpha", None),
        ("placement.actor=0", "placement.actor", "0"),
        ("run_name=2026", "run_name", "2026"),
        ('run_name="a"', "run_name", "a"),
        ("train.sharding=false", "train.sharding", False),
        ("model.cameras=['front']", "model.cameras", ["front"]),
        ('env.faults={"0/1/2" = "die"}', "env.faults.0/1/2", "die"),
        ("env.fault_dir=a=b", "env.fault_dir", "a=b"),
        ("env.fault_dir=", "env.fault_dir", ""),
    ],
)
def test_values_of_set(override_text, key, value):
    assert flatten(compose("toy_grpo", [override_text]).config)[key] == value


@pytest.mark.parametrize(
    ("override_text", "expected"),
    [
        ("optim.lr=abc", 'optim.lr = "abc" (from --set): wanted a valid number'),
        ("optim.lr=nan", "optim.lr = NaN (from --set): wanted a finite number"),
        ("optim.lr=-1", "optim.lr = -1 (from --set): wanted greater than 0"),
        ("optim.lr=true", "optim.lr = true (from --set): wanted a number"),
        ("optim.lr.x=1", "optim.lr"),
        ("env.num_envs=1.5", "env.num_envs = 1.5 (from --set): wanted a valid integer"),
        ("train.dtype=float16", "wanted 'float32' or 'bfloat16'"),
        ("rollout.tasks=3-1", "runs backwards"),
        ("optim=3", "optim = 3 (from --set): wanted a table"),
        ("env=3", "env = 3 (from --set): wanted a table"),
        ("env.name=3", "no environment is chosen"),
        ("env.name=nope", 'unknown environment "nope" (env.name from --set)'),
        ("optim.lr", "not of the form key=value"),
        ("=3", "not of the form key=value"),
        ("a..b=3", "not of the form key=value"),
        ("optim.lr =\udc80", "not of the form key=value"),
        ("run_name=../x", "run_name"),
        ("run_name=" + "x" * 300, "run_name"),
    ],
)
def test_mistakes_in_set(override_text, expected):
    assert expected in message("toy_grpo", override_text)


def test_an_unknown_key_gets_the_nearest_and_its_neighbours():
    text = message("libero_10_grpo", "algorithm.group_sise=4")
    assert 'unknown key "algorithm.group_sise" (from --set)' in text
    assert 'did you mean "algorithm.group_size"?' in text
    assert "clip_high, clip_" in text
    assert 'did you mean "optim.lr"?' in message("toy_grpo", "lr=1e-5")
    assert 'did you mean "optim"?' in message("toy_grpo", "optin.lr=1e-5")


def test_an_unknown_key_in_a_file_is_found_by_line(write):
    mine = write("mine.toml", 'extends = "toy_grpo"\n\n[optim]\n# note\nlearning_rate = 1e-5\n')
    assert 'unknown key "optim.learning_rate" (from mine.toml:5)' in message(mine)


def test_all_problems_are_listed():
    text = message("toy_grpo", "optim.lr=abc", "train.sed=1", "env.num_envs=0", "rollout.tasks=0")
    assert text.startswith("3 problems")
    for part in ('optim.lr = "abc"', '"train.sed"', '"train.seed"', "env.num_envs = 0"):
        assert part in text


def test_switching_a_plugin_names_the_keys_that_stay_behind():
    text = message("libero_10_grpo", "env.name=toy", "env.wrong=1")
    assert 'env.name = "toy" (from --set) does not fit what the preset says for "libero"' in text
    assert "wait_steps" in text
    assert 'unknown key "env.wrong" (from --set)' in text
    assert "Traceback" not in text


def test_a_rule_between_keys_is_reported():
    text = message("toy_grpo", "algorithm.reward_lower_bound=9")
    assert "reward_lower_bound must not exceed reward_upper_bound" in text


@given(st.text())
def test_any_text_after_set_is_a_layer_or_a_usage_error(text):
    with contextlib.suppress(ConfigError):
        assert parse_override(text)


@given(st.text(st.characters(codec="utf-8")))
def test_every_value_is_read_as_toml_or_kept_as_text(text):
    leaf = parse_override(f"a={text}")["a"]
    if isinstance(leaf, dict):
        assert text.strip().startswith("{")
    elif isinstance(leaf.value, str) and leaf.value != text.strip():
        assert text.strip()[0] in "'\""


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_run_names_are_safe_folder_names(name):
    try:
        run_name = compose("toy_grpo", [f"run_name={name}"]).config.run_name
    except ConfigError:
        return
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", run_name)


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_any_preset_name_is_found_or_refused(name):
    try:
        preset = presets.locate(name)
    except ConfigError:
        return
    assert preset.path.is_relative_to(preset.root)


# --------------------------------------------------------------------------------------------
# Resolved configurations
# --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("preset", ["toy_grpo", "libero_10_grpo", "libero_90_ppo_lora"])
def test_a_resolved_config_reads_back_equal(preset, tmp_path):
    config = compose(preset, ["rollout.tasks=0-3"]).config
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dump(config)))
    assert load_resolved(path) == config
    assert type(config) is RunConfig


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"optim": {"lr": "x"}}', '{"env": {"name": "toy"}, "new_key": 1}']
)
def test_a_config_that_cannot_be_read_is_an_integrity_error(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(IntegrityError, match=re.escape(str(path))):
        load_resolved(path)
    with pytest.raises(IntegrityError):
        load_resolved(tmp_path / "missing.json")


def test_override_of_a_resolved_config():
    config = compose("toy_grpo").config
    changed = override(config, ["train.max_steps=40", "optim.lr=0.02"], RESUMABLE_KEYS)
    assert [str(change) for change in diff(config, changed)] == ["train.max_steps: 20 -> 40"]
    assert override(config, ["optim.lr=1"]).optim.lr == 1.0
    with pytest.raises(ConfigError, match=r"optim\.lr: 0\.02 -> 1\.0") as caught:
        override(config, ["optim.lr=1", "train.max_steps=40"], RESUMABLE_KEYS)
    assert "train.max_steps" in caught.value.hint
    assert "train.max_steps" not in caught.value.message
    with pytest.raises(ConfigError, match=r"optim\.decay_steps: 0 -> 9"):
        override(config, ["optim.decay_steps=9"], RESUMABLE_KEYS)


def test_diff_between_plugins():
    changes = diff(compose("toy_grpo").config, compose("libero_10_grpo").config)
    signs = {change.key: change.sign for change in changes}
    assert signs["env.num_tasks"] == "-"
    assert signs["env.suite"] == "~"
    assert signs["env.wait_steps"] == "+"
    assert diff(compose("toy_grpo").config, compose("toy_grpo").config) == []
