"""Checkpoint directories of OpenVLA-OFT: what is read, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from vlactl_openvla_oft import loading
from vlactl_openvla_oft.architecture import FULL, PUBLISHED_TOWERS, TINY
from vlactl_openvla_oft.init import random_state
from vlactl_openvla_oft.model import build
from vlactl_openvla_oft.plugin import OpenVlaOftConfig
from vlactl_openvla_oft.policy import make_policy
from vlactl_openvla_oft.processor import prompt_text
from vlactl_openvla_oft.tokenizer import LlamaTokenizer

from vlactl.api.contracts import EnvSpec, ModelContext
from vlactl.errors import ConfigError, IntegrityError

RANGE = {"q01": [-1.0] * 7, "q99": [1.0] * 7}
STATISTICS = {"libero_10_no_noops": {"action": RANGE}, "bridge_orig": {"action": RANGE}}
CONFIG = {
    "model_type": "openvla",
    "timm_model_ids": list(PUBLISHED_TOWERS),
    "image_sizes": [224, 224],
    "text_config": {"model_type": "llama", "vocab_size": 32064, "pad_token_id": 32000},
    "norm_stats": STATISTICS,
}
PICTURES = {
    "image_resize_strategy": "resize-naive",
    "interpolations": ["bicubic", "bicubic"],
    "input_sizes": [[3, 224, 224], [3, 224, 224]],
    "means": [[0.485, 0.456, 0.406], [0.5, 0.5, 0.5]],
    "stds": [[0.229, 0.224, 0.225], [0.5, 0.5, 0.5]],
}


@pytest.fixture
def module():
    return build(TINY)


@pytest.fixture
def state(module):
    return random_state(module, 0)


def write_json(path, value):
    path.write_text(json.dumps(value))


def read_state(directory, module, seed=0):
    return loading.read_state(
        directory, module, device=torch.device("cpu"), dtype=torch.float32, seed=seed
    )


# --------------------------------------------------------------------------------------------
# Sizes
# --------------------------------------------------------------------------------------------
def test_a_silent_config_means_llama_2(tmp_path):
    write_json(tmp_path / "config.json", CONFIG)
    assert loading.read_architecture(tmp_path) == FULL
    for key in ("timm_model_ids", "image_sizes"):
        write_json(tmp_path / "config.json", {k: v for k, v in CONFIG.items() if k != key})
        assert loading.read_architecture(tmp_path) == FULL


def test_explicit_sizes_win(tmp_path):
    text = CONFIG["text_config"] | {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "max_position_embeddings": None,
    }
    write_json(tmp_path / "config.json", CONFIG | {"text_config": text, "pad_to_multiple_of": 32})
    architecture = loading.read_architecture(tmp_path)
    language = architecture.language
    assert (language.hidden_size, language.num_hidden_layers) == (64, 3)
    assert language.num_key_value_heads == 4
    assert (language.rms_norm_eps, language.rope_theta) == (1e-5, 5e5)
    assert language.max_position_embeddings == FULL.language.max_position_embeddings
    assert architecture.action_end == 32032


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "llava"},
        {"timm_model_ids": ["vit_tiny"]},
        {"image_sizes": [384, 384]},
        {"n_action_bins": 512},
        {"text_config": {"rope_scaling": {"type": "linear", "factor": 2}}},
        {"text_config": {"head_dim": 64}},
        {"text_config": {"hidden_act": "gelu"}},
        {"text_config": None},
        {"text_config": []},
        {"text_config": {"hidden_size": "4096"}},
        {"text_config": {"hidden_size": 0}},
        {"text_config": {"num_hidden_layers": True}},
        {"text_config": {"num_attention_heads": 0}},
        {"text_config": {"num_attention_heads": 33}},
        {"text_config": {"num_key_value_heads": 5}},
        {"text_config": {"vocab_size": 300}},
        {"text_config": {"pad_token_id": 32064}},
        {"text_config": {"rms_norm_eps": float("nan")}},
        {"text_config": {"rope_parameters": []}},
        {"text_config": {"rope_parameters": {"rope_theta": [1]}}},
        {"pad_to_multiple_of": None},
        {"pad_to_multiple_of": "64"},
    ],
)
def test_other_models_are_refused(tmp_path, change):
    write_json(tmp_path / "config.json", CONFIG | change)
    with pytest.raises(IntegrityError, match="not an OpenVLA-OFT checkpoint"):
        loading.read_architecture(tmp_path)


@pytest.mark.parametrize("text", [None, "{", "[1]"])
def test_bad_json_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"config\.json"):
        loading.read_architecture(tmp_path)


# --------------------------------------------------------------------------------------------
# Pictures, actions, tokenizer
# --------------------------------------------------------------------------------------------
def test_rounded_normalisation_wins(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    write_json(path, PICTURES)
    assert loading.read_picture_config(tmp_path, 224).means[0] == (0.485, 0.456, 0.406)
    rounded = [{"mean": [0.25] * 3, "std": [0.125] * 3}] * 2
    write_json(path, PICTURES | {"tvf_normalize_params": rounded})
    config = loading.read_picture_config(tmp_path, 224)
    assert (config.means[0], config.stds[1]) == ((0.25,) * 3, (0.125,) * 3)


@pytest.mark.parametrize(
    "change",
    [
        {"image_resize_strategy": "letterbox"},
        {"tvf_do_letterbox": True},
        {"interpolations": ["lanczos", "bicubic"]},
        {"input_sizes": [[3, 384, 384], [3, 384, 384]]},
        {"means": [[0.5] * 3]},
        {"means": [[float("inf")] * 3] * 2},
        {"stds": [[0.0] * 3] * 2},
        {"interpolations": 5},
        {"interpolations": None},
        {"tvf_normalize_params": 5},
    ],
)
def test_other_picture_roads_are_refused(tmp_path, change):
    write_json(tmp_path / "preprocessor_config.json", PICTURES | change)
    with pytest.raises(IntegrityError):
        loading.read_picture_config(tmp_path, 224)


def test_dataset_statistics_are_merged_over_the_config(tmp_path):
    write_json(tmp_path / "config.json", CONFIG)
    newer = {"bridge_orig": {"action": RANGE | {"q99": [2.0] * 7}}}
    write_json(tmp_path / "dataset_statistics.json", newer)
    statistics = loading.read_statistics(tmp_path)
    assert set(statistics) == set(STATISTICS)
    assert loading.action_statistics(statistics, "bridge_orig").q99[0] == 2


@pytest.mark.parametrize(
    ("known", "key", "found"),
    [
        (["a_no_noops", "b"], "b", "b"),
        (["a_no_noops", "b"], "a", "a_no_noops"),
        (["a", "a_no_noops"], "a", "a"),
        (["only"], "", "only"),
    ],
)
def test_unnorm_key(known, key, found):
    assert loading.resolve_unnorm_key(known, key) == found


@pytest.mark.parametrize("key", ["libero_1", ""])
def test_unknown_unnorm_key_lists_what_there_is(key):
    with pytest.raises(ConfigError) as caught:
        loading.action_statistics(STATISTICS, key)
    assert "bridge_orig, libero_10_no_noops" in caught.value.hint
    assert ('did you mean "libero_10_no_noops"' in caught.value.hint) == bool(key)


@pytest.mark.parametrize("stated", [["a"], "text", 5])
def test_statistics_must_have_names(tmp_path, stated):
    write_json(tmp_path / "config.json", CONFIG | {"norm_stats": stated})
    with pytest.raises(IntegrityError, match="norm_stats"):
        loading.read_statistics(tmp_path)


@pytest.mark.parametrize(
    "action",
    [
        {},
        [],
        None,
        {"q01": [0.0], "q99": [1.0]},
        RANGE | {"mask": [True]},
        RANGE | {"q01": [float("nan")] * 7},
        RANGE | {"q99": [1e400] * 7},
        RANGE | {"q99": [10**400] * 7},
    ],
)
def test_unusable_statistics_are_refused(action):
    with pytest.raises(IntegrityError, match="action statistics"):
        loading.action_statistics({"a": {"action": action}}, "a")


def test_mask_is_optional():
    assert loading.action_statistics(STATISTICS, "bridge_orig").mask.all()
    silent = {"a": {"action": RANGE | {"mask": None}}}
    assert loading.action_statistics(silent, "a").mask.all()


def save_tokenizer(path, blank_id):
    """Knows the first token and the blank, and takes everything else for unknown."""
    vocabulary = {"<unk>": 0, "<s>": 1, " ": blank_id}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(path))


def test_tokenizer_must_be_that_of_llama(tmp_path):
    path = tmp_path / "tokenizer.json"
    save_tokenizer(path, 29871)
    ids = LlamaTokenizer(path).encode(prompt_text("open the drawer"))
    assert (ids[0], ids[-1]) == (1, 29871)
    save_tokenizer(path, 220)
    with pytest.raises(IntegrityError, match="Llama-2"):
        LlamaTokenizer(path).encode(prompt_text("open the drawer"))
    path.write_text("{}")
    with pytest.raises(IntegrityError, match="damaged"):
        LlamaTokenizer(path)


def test_a_directory_without_weights_gets_as_far_as_the_weights(tmp_path):
    write_json(tmp_path / "config.json", CONFIG)
    write_json(tmp_path / "preprocessor_config.json", PICTURES)
    save_tokenizer(tmp_path / "tokenizer.json", 29871)
    config = OpenVlaOftConfig(path=str(tmp_path), unnorm_key="libero_10")
    env = EnvSpec(
        cameras={"agentview": (256, 256)},
        state_dim=8,
        action_dim=7,
        max_episode_steps=10,
        control_hz=20,
        tasks=(),
    )
    context = ModelContext(env=env, device=torch.device("cpu"), dtype=torch.bfloat16, seed=0)
    with pytest.raises(IntegrityError, match=r"neither model\.safetensors nor"):
        make_policy(config, context)


def test_missing_tokenizer_is_refused(tmp_path):
    with pytest.raises(IntegrityError, match=r"tokenizer\.json"):
        LlamaTokenizer(tmp_path / "tokenizer.json")


# --------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------
def save_shards(directory, state):
    names = sorted(state)
    halves = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: state[name] for name in part}, directory / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    write_json(directory / loading.INDEX, {"weight_map": weight_map})
    return weight_map


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_are_read_as_they_are(tmp_path, module, state, sharded):
    if sharded:
        save_shards(tmp_path, state)
    else:
        save_file(state, tmp_path / loading.SINGLE)
    read = read_state(tmp_path, module)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())


def test_missing_and_unexpected_tensors_are_listed(tmp_path, module, state):
    del state["projector.fc3.bias"]
    state["projector.fc4.bias"] = torch.zeros(1)
    save_file(state, tmp_path / loading.SINGLE)
    with pytest.raises(IntegrityError) as caught:
        read_state(tmp_path, module)
    assert "missing: projector.fc3.bias" in caught.value.message
    assert "unexpected: projector.fc4.bias" in caught.value.message


def test_wrong_shapes_are_listed(tmp_path, module, state):
    state["projector.fc3.bias"] = torch.zeros(3)
    save_file(state, tmp_path / loading.SINGLE)
    with pytest.raises(IntegrityError, match=r"projector\.fc3\.bias \[3\] instead of \[128\]"):
        read_state(tmp_path, module)


def test_value_head_is_optional_both_ways(tmp_path, module, state):
    valued = build(replace(TINY, value_outputs=8))
    save_file(state, tmp_path / loading.SINGLE)
    name = "value_head.mlp.0.weight"
    fresh = read_state(tmp_path, valued, seed=5)
    assert torch.equal(fresh[name], random_state(valued, 5)[name])
    save_file(random_state(valued, 6), tmp_path / loading.SINGLE)
    stored = read_state(tmp_path, valued, seed=5)
    assert torch.equal(stored[name], random_state(valued, 6)[name])
    assert read_state(tmp_path, module).keys() == state.keys()


def test_half_a_value_head_is_refused(tmp_path):
    valued = build(replace(TINY, value_outputs=8))
    state = random_state(valued, 0)
    del state["value_head.mlp.0.bias"]
    state["value_head.other"] = torch.zeros(1)
    save_file(state, tmp_path / loading.SINGLE)
    with pytest.raises(IntegrityError, match="value head") as caught:
        read_state(tmp_path, valued)
    assert "missing: value_head.mlp.0.bias" in caught.value.message
    assert "unexpected: value_head.other" in caught.value.message


@pytest.mark.parametrize(("stored", "wanted"), [(8, 1), (1, 8)])
def test_a_value_head_of_the_other_level_is_refused(tmp_path, stored, wanted):
    save_file(
        random_state(build(replace(TINY, value_outputs=stored)), 0), tmp_path / loading.SINGLE
    )
    with pytest.raises(IntegrityError, match="per action") as caught:
        read_state(tmp_path, build(replace(TINY, value_outputs=wanted)))
    assert f"[{stored}, 128] instead of [{wanted}, 128]" in caught.value.message


LOAD = """
import sys
from pathlib import Path
import torch
from vlactl_openvla_oft import loading
from vlactl_openvla_oft.architecture import TINY
from vlactl_openvla_oft.model import build, materialise
from dataclasses import replace
module = build(replace(TINY, language=replace(TINY.language, **{sizes})))

def kilobytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))

before = kilobytes("VmRSS")
state = loading.read_state(
    Path(sys.argv[1]), module, device=torch.device("cpu"), dtype=torch.bfloat16, seed=0
)
materialise(module, state)
print(1024 * (kilobytes("VmHWM") - before))
"""
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_loading_needs_no_second_copy(tmp_path, stored):
    module = build(replace(TINY, language=replace(TINY.language, **LARGE)))
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    state = {name: torch.zeros(shape, dtype=stored) for name, shape in shapes.items()}
    save_file(state, tmp_path / loading.SINGLE)
    size = sum(2 * shape.numel() for shape in shapes.values())
    assert size > 250e6
    command = [sys.executable, "-c", LOAD.replace("{sizes}", repr(LARGE)), str(tmp_path)]
    taken = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert size < taken < 1.4 * size


def test_missing_shard_is_named(tmp_path, module, state):
    save_shards(tmp_path, state)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(IntegrityError, match=r"two\.safetensors"):
        read_state(tmp_path, module)


def test_a_shard_without_its_tensor_is_named(tmp_path, module, state):
    weight_map = save_shards(tmp_path, state)
    name = next(name for name, file in weight_map.items() if file == "one.safetensors")
    write_json(tmp_path / loading.INDEX, {"weight_map": weight_map | {name: "two.safetensors"}})
    with pytest.raises(IntegrityError, match=name):
        read_state(tmp_path, module)


def test_a_tensor_that_the_index_does_not_name_is_refused(tmp_path, module, state):
    save_shards(tmp_path, state | {"lost": torch.zeros(1)})
    index = json.loads((tmp_path / loading.INDEX).read_text())
    del index["weight_map"]["lost"]
    write_json(tmp_path / loading.INDEX, index)
    with pytest.raises(IntegrityError, match="holds lost"):
        read_state(tmp_path, module)


@pytest.mark.parametrize("weight_map", [None, {"a": 1}, {"a": "../outside.safetensors"}])
def test_bad_index_is_refused(tmp_path, module, weight_map):
    write_json(tmp_path / loading.INDEX, {"weight_map": weight_map})
    with pytest.raises(IntegrityError):
        read_state(tmp_path, module)


def test_truncated_weights_are_refused(tmp_path, module, state):
    path = tmp_path / loading.SINGLE
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(IntegrityError, match="damaged"):
        read_state(tmp_path, module)


def test_pickles_are_not_read(tmp_path, module):
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(IntegrityError, match="safetensors"):
        read_state(tmp_path, module)
