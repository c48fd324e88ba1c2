"""The catalogue of published checkpoints, and how their dialects get into configurations."""

from __future__ import annotations

import pytest

from vlactl.config import catalogue
from vlactl.config.compose import compose, override
from vlactl.errors import ConfigError
from vlactl.hub.models import ModelName, parse_name

TRAJ1 = "Haozhan72/Openvla-oft-SFT-libero10-traj1"
L1 = "moojink/openvla-7b-oft-finetuned-libero-10"
LIBERO_90 = "RLinf/RLinf-OpenVLAOFT-LIBERO-90-Base-Lora"
DIALECT = ("head", "cameras", "image_pipeline", "keep_stop_token")


@pytest.fixture
def ship(fake_distribution):
    """Install a distribution with a catalogue and a preset."""

    def install(text, preset=""):
        fake_distribution(
            "extra-models",
            {"vlactl.presets": {"x": "extra_models"}},
            {
                "extra_models/__init__.py": "",
                "extra_models/presets/_models.toml": text,
                "extra_models/presets/mine.toml": preset,
            },
        )

    return install


def dialect(preset, *overrides):
    model = compose(preset, overrides).config.model
    return tuple(getattr(model, key) for key in DIALECT)


def entry(repo, *lines):
    facts = ['summary = "s"', 'licence = "l"', "size = 1", *lines]
    return "\n".join([f'["{repo}"]', *facts, ""])


def test_every_shipped_entry_is_whole():
    known = [each for each in catalogue.entries() if "/" in each.repo]
    assert len(known) >= 17
    for each in known:
        assert each.summary.isascii()
        assert "Llama 2" in each.licence
        assert 15e9 < each.size < 16e9
        assert each.model.keys() >= set(DIALECT)
        patterns = {"action_head--*_checkpoint.pt", "proprio_projector--*_checkpoint.pt"}
        assert set(each.also) == (patterns if each.repo.startswith("moojink/") else set())


@pytest.mark.parametrize("each", catalogue.entries(), ids=lambda each: each.repo)
def test_every_shipped_entry_fits_the_model_that_it_is_for(each):
    config = compose("libero_10_grpo", [f"model.checkpoint={each.repo}"]).config
    assert config.model.checkpoint == each.repo
    assert set(config.model.cameras) <= {"agentview", "wrist"}
    assert bool(config.model.training_blockers(has_adapters=False)) == each.repo.startswith(
        "moojink/"
    )


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (TRAJ1, ModelName(TRAJ1)),
        (TRAJ1.lower(), ModelName(TRAJ1)),
        ("openvla_7b", ModelName("openvla/openvla-7b")),
        ("someone/else@main", ModelName("someone/else", "main")),
        (f"openvla-7b@{'a' * 40}", ModelName("openvla/openvla-7b", "a" * 40)),
    ],
)
def test_names(text, name):
    assert parse_name(text) == name


@pytest.mark.parametrize(
    "text", ["", "model", "a/b/c", "../b", "a/..", "a/b@", "a/b@../x", "a--b/c", "/b", "a b/c"]
)
def test_what_is_no_name(text):
    with pytest.raises(ConfigError, match=r"owner/name\[@revision\]"):
        parse_name(text)


def test_a_misspelt_name_is_guessed():
    with pytest.raises(ConfigError, match="did you mean openvla/openvla-7b"):
        parse_name("openvla-7")


# --------------------------------------------------------------------------------------------
# Dialects
# --------------------------------------------------------------------------------------------
def test_the_recipe_says_how_it_differs_from_its_checkpoint():
    composed = compose("libero_10_grpo")
    assert composed.config.model.checkpoint == TRAJ1
    assert dialect("libero_10_grpo") == ("tokens", ("agentview",), "rlinf", False)
    assert composed.provenance["model.keep_stop_token"].startswith("presets/_bases/libero_10.toml:")
    assert composed.provenance["model.head"].startswith("presets/_models.toml:")


def test_another_checkpoint_brings_its_own_dialect():
    wanted = ("l1", ("agentview", "wrist"), "official", True)
    assert dialect("libero_10_grpo", f"model.checkpoint={L1}") == wanted
    assert dialect("libero_90_grpo") == ("tokens", ("agentview",), "rlinf", False)
    assert dialect("libero_90_grpo", f"model.checkpoint={TRAJ1}")[2:] == ("official", True)


def test_a_key_beside_or_above_the_checkpoint_wins_in_any_order():
    for order in (1, -1):
        sets = [f"model.checkpoint={L1}", "model.keep_stop_token=false"][::order]
        assert dialect("libero_10_grpo", *sets)[2:] == ("official", False)


def test_naming_the_same_checkpoint_again_changes_nothing():
    assert dialect("libero_10_grpo", f"model.checkpoint={TRAJ1}") == dialect("libero_10_grpo")


def test_an_unknown_checkpoint_keeps_what_presets_say_and_drops_what_another_wanted(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text(f'extends = "libero_10_grpo"\n[model]\ncheckpoint = "{L1}"\n')
    assert dialect(str(mine))[0] == "l1"
    assert dialect(str(mine), "model.checkpoint=my/own") == (
        "tokens",
        ("agentview",),
        "rlinf",
        False,
    )


def test_a_resolved_configuration_can_change_its_checkpoint():
    config = override(compose("libero_10_grpo").config, [f"model.checkpoint={L1}"])
    assert (config.model.head, config.model.image_pipeline) == ("l1", "official")


def test_small_models_name_no_checkpoint():
    for preset in ("libero_10_tiny_grpo", "toy_grpo"):
        origins = compose(preset).provenance.values()
        assert not any("_models.toml" in origin for origin in origins)


# --------------------------------------------------------------------------------------------
# Catalogues of others
# --------------------------------------------------------------------------------------------
def test_another_distribution_can_ship_a_catalogue(ship):
    ship(
        entry("lab/model", f'revision = "{"b" * 40}"')
        + '["lab/model".model]\nkeep_stop_token = true\n',
        'extends = "libero_10_grpo"\n[model]\ncheckpoint = "lab/model"\n',
    )
    assert parse_name("lab/model") == ModelName("lab/model", "b" * 40)
    composed = compose("mine")
    assert composed.config.model.keep_stop_token
    origin = composed.provenance["model.keep_stop_token"]
    assert origin == "extra-models:presets/_models.toml:7"


def test_the_built_in_entry_stays(ship):
    ship(entry("openvla/openvla-7b"))
    assert catalogue.find("openvla-7b").summary != "s"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("oops = 1", "oops"),
        (entry("a/b", "tokens = 3"), "a/b.tokens"),
        (entry("a/b", 'revision = "main"'), "a/b.revision"),
        (entry("a/b", 'sha256 = {x = "12"}'), "a/b.sha256.x"),
        (entry("just-a-name"), "just-a-name.repo"),
        (entry("a/b").replace('summary = "s"', ""), "a/b.summary"),
    ],
)
def test_mistakes_in_a_catalogue_are_found_by_file_and_key(ship, text, expected):
    ship(text)
    with pytest.raises(ConfigError) as caught:
        catalogue.entries()
    assert f"extra-models:presets/_models.toml: {expected}" in str(caught.value)
