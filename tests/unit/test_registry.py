"""Discovery: what is listed, what is found, and how broken plugins are kept apart."""

from __future__ import annotations

import json
import sys

import pytest

from vlactl.api import registry
from vlactl.api.plugins import AlgorithmPlugin, Requirement
from vlactl.errors import ConfigError, EnvironmentNotReadyError

GROUP = "vlactl.algorithms"
GOOD = """
    from vlactl.api.plugins import AlgorithmConfig, AlgorithmPlugin, Requirement

    PLUGIN = AlgorithmPlugin(
        name="{name}", summary="made up", config=AlgorithmConfig, factory="nowhere:make",
        api_version={api}, requirements=({requirements}),
    )
"""


def plugin_source(name, api=1, requirements=""):
    return GOOD.format(name=name, api=api, requirements=requirements)


def status(name):
    found = [item for item in registry.listing() if item.plugin.name == name]
    assert len(found) == 1
    return found[0].status


def test_builtin_plugins_are_found_the_way_others_are():
    names = {(item.plugin.kind, item.plugin.name) for item in registry.listing()}
    assert {("environment", "libero"), ("model", "openvla-oft"), ("algorithm", "grpo")} <= names
    assert registry.find("algorithm", "grpo").name == "grpo"
    assert registry.find("model", "openvla_oft").name == "openvla-oft"


def test_a_good_plugin_is_listed_with_its_distribution(fake_distribution):
    fake_distribution(
        "acme-rl", {GROUP: {"acme": "acme_a:PLUGIN"}}, {"acme_a.py": plugin_source("acme")}
    )
    [item] = [item for item in registry.listing() if item.plugin.name == "acme"]
    assert (item.status, item.plugin.source, item.plugin.version) == ("ok", "acme-rl", "1.0")
    assert registry.find("algorithm", "acme").summary == "made up"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("raise RuntimeError('no\\nluck')", "broken: RuntimeError: no luck"),
        ("import sys\nsys.exit(3)", "broken: SystemExit: 3"),
        ("import not_installed_anywhere", "broken: ModuleNotFoundError: No module named"),
        ("PLUGIN = 3", "broken: bad:PLUGIN is no plugin descriptor"),
        ("OTHER = 3", "broken: AttributeError"),
        (plugin_source("bad", api=2), "incompatible: plugin api 2, vlactl has 1"),
        (plugin_source("good"), 'broken: its descriptor is called "good"'),
        (
            plugin_source("bad", requirements="Requirement(distribution='x', specifier='~1'),"),
            'broken: "~1" is no version specifier',
        ),
        (
            "from vlactl_grpo.plugin import PLUGIN as G\n"
            "from dataclasses import replace\n"
            "from vlactl.api.plugins import PluginConfig\n"
            "PLUGIN = replace(G, name='bad', config=PluginConfig)",
            "broken: its config class does not derive from AlgorithmConfig",
        ),
        ("from vlactl_toy.plugin import MODEL as PLUGIN", "broken: bad:PLUGIN is a ModelPlugin"),
    ],
)
def test_a_broken_plugin_breaks_only_itself(fake_distribution, monkeypatch, source, expected):
    monkeypatch.delitem(sys.modules, "bad", raising=False)
    fake_distribution("bad-dist", {GROUP: {"bad": "bad:PLUGIN"}}, {"bad.py": source})
    assert status("bad").startswith(expected)
    assert status("grpo") == "ok"
    assert registry.find("algorithm", "grpo").name == "grpo"
    with pytest.raises(
        EnvironmentNotReadyError, match='algorithm "bad" of distribution "bad-dist"'
    ):
        registry.find("algorithm", "bad")


def test_the_way_out_of_a_broken_plugin(fake_distribution):
    fake_distribution(
        "rotten",
        {GROUP: {"lost": "rotten_a:PLUGIN", "old": "rotten_b:PLUGIN", "half": "rotten_c:PLUGIN"}},
        {
            "rotten_a.py": "import not_installed_anywhere",
            "rotten_b.py": plugin_source("old", api=2),
            "rotten_c.py": plugin_source("half"),
        },
    )
    with pytest.raises(EnvironmentNotReadyError) as caught:
        registry.find("algorithm", "lost")
    assert caught.value.hint == (
        "upgrade or uninstall rotten; "
        "its author sees why with: python -c 'from rotten_a import PLUGIN'"
    )
    with pytest.raises(EnvironmentNotReadyError) as caught:
        registry.find("algorithm", "old")
    assert caught.value.hint == "upgrade or uninstall rotten"
    with pytest.raises(EnvironmentNotReadyError) as caught:
        registry.load_factory(registry.find("algorithm", "half"))
    assert caught.value.hint == (
        "upgrade or uninstall rotten; "
        "its author sees why with: python -c 'from nowhere import make'"
    )


def test_a_duplicate_of_a_built_in_can_only_be_dropped(fake_distribution):
    fake_distribution(
        "mine", {GROUP: {"grpo": "mine_a:PLUGIN"}}, {"mine_a.py": plugin_source("grpo")}
    )
    with pytest.raises(ConfigError, match='"vlactl" and "mine"') as caught:
        registry.find("algorithm", "grpo")
    assert caught.value.hint == "uninstall mine, or set VLACTL_PLUGINS= to use the built-in one"


def test_two_plugins_of_one_name_are_an_error_that_names_both(fake_distribution):
    fake_distribution(
        "one", {GROUP: {"twin": "twin_a:PLUGIN"}}, {"twin_a.py": plugin_source("twin")}
    )
    fake_distribution(
        "two", {GROUP: {"twin": "twin_b:PLUGIN"}}, {"twin_b.py": plugin_source("twin")}
    )
    statuses = [item.status for item in registry.listing() if item.plugin.name == "twin"]
    assert statuses == ['duplicate: "one" and "two"'] * 2
    with pytest.raises(ConfigError, match='"one" and "two"'):
        registry.find("algorithm", "twin")


def test_the_allow_list_settles_duplicates(fake_distribution, monkeypatch):
    fake_distribution(
        "three", {GROUP: {"pair": "pair_a:PLUGIN"}}, {"pair_a.py": plugin_source("pair")}
    )
    fake_distribution(
        "four", {GROUP: {"pair": "pair_b:PLUGIN"}}, {"pair_b.py": plugin_source("pair")}
    )
    monkeypatch.setenv("VLACTL_PLUGINS", " Three ,")
    assert registry.find("algorithm", "pair").name == "pair"
    statuses = {
        i.plugin.distribution: i.status for i in registry.listing() if i.plugin.name == "pair"
    }
    assert statuses == {"three": "ok", "four": "not allowed: VLACTL_PLUGINS"}


def test_an_empty_allow_list_leaves_the_built_ins_and_loads_nothing_else(
    fake_distribution, monkeypatch
):
    fake_distribution("evil", {GROUP: {"evil": "evil:PLUGIN"}}, {"evil.py": "raise SystemExit"})
    monkeypatch.setenv("VLACTL_PLUGINS", "")
    assert status("evil") == "not allowed: VLACTL_PLUGINS"
    assert "evil" not in registry.names("algorithm")
    assert registry.find("algorithm", "grpo").name == "grpo"
    with pytest.raises(ConfigError, match="not allowed"):
        registry.find("algorithm", "evil")


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ConfigError, match=r'unknown environment "libera"') as caught:
        registry.find("environment", "libera")
    assert 'did you mean "libero"?' in caught.value.hint
    assert "vlactl plugins list" in caught.value.hint


def descriptor(**changes):
    return AlgorithmPlugin(
        name="made-up",
        summary="",
        config=registry.find("algorithm", "grpo").config,
        api_version=1,
        **{"factory": "nowhere:make"} | changes,
    )


@pytest.mark.parametrize(
    ("requirement", "message", "hint"),
    [
        (Requirement(distribution="no-such-dist", install="make it"), "no-such-dist", "make it"),
        (
            Requirement(distribution="pydantic", specifier=">=99"),
            r"missing: pydantic >=99 \(.* is installed\)",
            'pip install "pydantic>=99"',
        ),
    ],
)
def test_requirements_that_are_not_met_come_with_the_cure(requirement, message, hint):
    with pytest.raises(EnvironmentNotReadyError, match=message) as caught:
        registry.require(descriptor(requirements=(requirement,)))
    assert caught.value.hint == hint
    assert caught.value.exit_code == 3


def test_requirements_that_are_met_pass():
    registry.require(descriptor(requirements=(Requirement(distribution="pydantic"),)))


def test_a_factory_that_is_not_there_is_named():
    with pytest.raises(EnvironmentNotReadyError, match="nowhere:make"):
        registry.load_factory(descriptor())
    with pytest.raises(EnvironmentNotReadyError, match='has no "missing"'):
        registry.load_factory(descriptor(factory="json:missing"))
    assert registry.load_factory(descriptor(factory="json:dumps")) is json.dumps


def test_preset_folders_of_other_distributions(fake_distribution, monkeypatch):
    root = fake_distribution(
        "acme-presets",
        {"vlactl.presets": {"acme": "acme_presets", "gone": "not_a_package_anywhere"}},
        {"acme_presets/__init__.py": "raise SystemExit", "acme_presets/presets/x.toml": ""},
    )
    folders = {folder.distribution: folder.path for folder in registry.preset_folders()}
    assert folders["acme-presets"] == root / "acme_presets/presets"
    assert (folders["vlactl"] / "toy_grpo.toml").is_file()
    monkeypatch.setenv("VLACTL_PLUGINS", "")
    assert [folder.distribution for folder in registry.preset_folders()] == ["vlactl"]
