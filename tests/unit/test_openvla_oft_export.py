"""Exported directories of OpenVLA-OFT: complete, the same policy again, and never more than asked.

Shapes and names of the published model are those of the golden checkpoint, which is small.
"""

from __future__ import annotations

import json
import lzma
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from vlactl_openvla_oft import loading, lora
from vlactl_openvla_oft.architecture import ACTION_DIM, TowerConfig, VisionConfig
from vlactl_openvla_oft.export import export_policy, write_weights
from vlactl_openvla_oft.model import build, materialise
from vlactl_openvla_oft.plugin import OpenVlaOftConfig
from vlactl_openvla_oft.policy import make_policy

from vlactl.api.contracts import EnvSpec, Greedy, LoraContext, ModelContext, ObservationBatch
from vlactl.errors import ConfigError

GOLDEN = Path(__file__).parents[1] / "golden" / "data" / "openvla_oft"
CPU = torch.device("cpu")
ENV = EnvSpec(
    cameras={"agentview": (96, 96)},
    state_dim=8,
    action_dim=ACTION_DIM,
    max_episode_steps=10,
    control_hz=20,
    tasks=(),
)
CONTEXT = ModelContext(env=ENV, device=CPU, dtype=torch.float32, seed=3)
ADAPTERS = LoraContext(rank=4, alpha=8.0)
CONFIG = OpenVlaOftConfig(size="tiny")


def trained(context=CONTEXT):
    """A policy whose trained parameters are no longer those that it started with."""
    policy = make_policy(CONFIG, context)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in policy.trainable():
            noise = torch.randn(parameter.shape, generator=generator) / 20
            parameter.add_(noise.to(parameter.dtype))
    return policy


def exported(policy, directory, **options):
    directory.mkdir()
    options = {"source": None, "adapter_only": False} | options
    export_policy(policy.module, directory, **options)
    return directory


def again(directory, context=CONTEXT):
    return make_policy(CONFIG.model_copy(update={"path": str(directory)}), context)


def observe(num_rows=2):
    rng = np.random.default_rng(0)
    images = {"agentview": rng.integers(0, 256, (num_rows, 96, 96, 3), dtype=np.uint8)}
    return ObservationBatch(
        images=images,
        state=np.zeros((num_rows, 8), np.float32),
        instructions=("open the drawer", "push the plate")[:num_rows],
    )


def assert_same_state(actual, expected):
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different


def assert_same_actions(actual, expected):
    observations = observe()
    first, second = (policy.act(observations, Greedy(), [0, 0]) for policy in (actual, expected))
    np.testing.assert_array_equal(first.tokens_BKA, second.tokens_BKA)
    np.testing.assert_array_equal(first.actions_BKA, second.actions_BKA)


def json_of(path):
    return json.loads(path.read_text())


# --------------------------------------------------------------------------------------------
# Whole policies
# --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("values", ["none", "action", "chunk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_policy_comes_back_bit_by_bit(tmp_path, values, dtype):
    context = replace(CONTEXT, values=values, dtype=dtype)
    policy = trained(context)
    directory = tmp_path / "out"
    directory.mkdir()
    policy.export(directory, adapter_only=False)
    back = again(directory, context)
    assert_same_state(back.module.state_dict(), policy.module.state_dict())
    assert_same_actions(back, policy)
    assert json_of(directory / "config.json")["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_an_export_can_be_exported_again(tmp_path):
    first = exported(trained(), tmp_path / "first")
    second = exported(again(first), tmp_path / "second", source=first)
    assert contents(first) == contents(second)


def test_the_same_state_gives_the_same_bytes(tmp_path):
    policy = trained()
    first, second = (exported(policy, tmp_path / name) for name in ("first", "second"))
    assert contents(first) == contents(second)


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_files_can_be_read_by_those_who_can_read_the_others(tmp_path):
    directory = exported(trained(), tmp_path / "out")
    assert len({path.stat().st_mode for path in directory.iterdir()}) == 1


@pytest.mark.parametrize("shard_bytes", [1, 10**6, 3 * 10**6])
def test_shards(tmp_path, shard_bytes):
    policy = trained()
    directory = exported(policy, tmp_path / "out", shard_bytes=shard_bytes)
    index = json_of(directory / loading.INDEX)
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    count = len(files)
    assert files == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    assert set(index["weight_map"].values()) == set(files)
    state = policy.module.state_dict()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in state.values())
    for file in files:
        held = load_file(directory / file)
        assert {name for name, of in index["weight_map"].items() if of == file} == held.keys()
        assert len(held) == 1 or sum(value.nbytes for value in held.values()) <= shard_bytes
    assert_same_state(again(directory).module.state_dict(), state)


def test_one_shard_needs_no_index(tmp_path):
    directory = exported(trained(), tmp_path / "out")
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", loading.SINGLE]
    with safe_open(directory / loading.SINGLE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_no_more_than_a_shard_is_held(tmp_path):
    made = []

    def tensors():
        for index in range(9):
            tensor = torch.full((1000,), index)
            made.append(weakref.ref(tensor))
            yield f"tensor_{index}", tensor
            del tensor
            assert sum(ref() is not None for ref in made) <= 3

    write_weights(tensors(), tmp_path, 3 * 8000)
    assert len(list(tmp_path.glob("model-*-of-00003.safetensors"))) == 3


# --------------------------------------------------------------------------------------------
# The published layout
# --------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The golden checkpoint with everything that published directories hold beside it."""
    directory = tmp_path_factory.mktemp("published")
    for name in ("config.json", "dataset_statistics.json", "preprocessor_config.json"):
        shutil.copyfile(GOLDEN / name, directory / name)
    weights = lzma.decompress((GOLDEN / "state_dict.safetensors.xz").read_bytes())
    (directory / loading.SINGLE).write_bytes(weights)
    config = json_of(directory / "config.json")
    write_json(directory / "config.json", config | {"auto_map": {"AutoConfig": "code.Config"}})
    processor = {"auto_map": {"AutoProcessor": "code.Processor"}, "processor_class": "P"}
    write_json(directory / "processor_config.json", processor)
    for name in ("tokenizer.json", "generation_config.json", "added_tokens.json"):
        write_json(directory / name, {"name": name})
    for name in ("tokenizer.model", "code.py", "optimizer.pt", "pytorch_model.bin", "notes.txt"):
        (directory / name).write_bytes(b"\0" + name.encode())
    return directory


def write_json(path, value):
    path.write_text(json.dumps(value))


def network(directory, dtype=torch.float32):
    """The recorded network, whose towers config.json cannot describe."""
    recorded = json_of(GOLDEN / "tiny_vision.json")["vit"]
    names = TowerConfig.__dataclass_fields__.keys() - {"stem"}
    towers = {t["role"]: TowerConfig(**{name: t[name] for name in names}) for t in recorded}
    architecture = loading.read_architecture(
        directory, vision=VisionConfig(**towers), value_outputs=8
    )
    module = build(architecture)
    state = loading.read_state(directory, module, device=CPU, dtype=dtype, seed=0)
    materialise(module, state)
    return module


def test_a_published_checkpoint_comes_back(tmp_path, published):
    module = network(published)
    export_policy(module, tmp_path, source=published, adapter_only=False, shard_bytes=10**6)
    back = network(tmp_path)
    assert_same_state(back.state_dict(), module.state_dict())
    assert json_of(tmp_path / loading.INDEX)["weight_map"].keys() == names_in(published)
    assert loading.read_statistics(tmp_path) == loading.read_statistics(published)
    pictures = [loading.read_picture_config(path, 56) for path in (tmp_path, published)]
    assert pictures[0] == pictures[1]


def names_in(directory):
    with safe_open(directory / loading.SINGLE, framework="pt") as file:
        return set(file.keys())


def test_what_lies_beside_the_weights(tmp_path, published):
    export_policy(network(published), tmp_path, source=published, adapter_only=False)
    before, after = ({path.name for path in of.iterdir()} for of in (published, tmp_path))
    assert before - after == {"code.py", "notes.txt", "optimizer.pt", "pytorch_model.bin"}
    assert after <= before
    for name in ("tokenizer.model", "tokenizer.json", "preprocessor_config.json"):
        assert (tmp_path / name).read_bytes() == (published / name).read_bytes()
    assert json_of(tmp_path / "processor_config.json") == {"processor_class": "P"}


def test_the_config_knows_all_statistics_and_names_no_code(tmp_path, published):
    export_policy(
        network(published, torch.bfloat16), tmp_path, source=published, adapter_only=False
    )
    before, after = (json_of(path / "config.json") for path in (published, tmp_path))
    changed = {key for key in before | after if before.get(key) != after.get(key)}
    assert changed == {"auto_map", "norm_stats", "text_config", "torch_dtype"}
    assert "auto_map" not in after
    assert after["norm_stats"].keys() == {"bridge_orig", "libero_10_no_noops"}
    assert after["norm_stats"] == json_of(tmp_path / "dataset_statistics.json")
    assert after["torch_dtype"] == after["text_config"]["torch_dtype"] == "bfloat16"


# --------------------------------------------------------------------------------------------
# Adapters
# --------------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=["effective", "published"])
def adapted(request):
    return trained(replace(CONTEXT, lora=replace(ADAPTERS, targets=request.param)))


def logits(policy):
    """Before the softmax, so that nothing hides a difference."""
    with torch.no_grad():
        return policy._predict(observe()).logits


def test_adapters_are_merged(tmp_path, adapted):
    directory = exported(adapted, tmp_path / "out")
    plain = again(directory)
    untrained = make_policy(CONFIG, CONTEXT)
    assert plain.module.state_dict().keys() == untrained.module.state_dict().keys()
    assert (logits(adapted) - logits(untrained)).abs().max() > 0.01
    torch.testing.assert_close(logits(plain), logits(adapted), rtol=0, atol=1e-5)
    assert_same_state(plain.module.state_dict(), dict(lora.merged_state(adapted.module)))


def test_an_export_leaves_the_policy_alone(tmp_path, adapted):
    before = {name: value.clone() for name, value in adapted.module.state_dict().items()}
    exported(adapted, tmp_path / "out")
    assert_same_state(adapted.module.state_dict(), before)


@pytest.mark.parametrize("targets", ["effective", "published"])
def test_an_adapter_is_loaded_again(tmp_path, targets):
    context = replace(CONTEXT, lora=replace(ADAPTERS, targets=targets))
    policy = trained(context)
    directory = exported(policy, tmp_path / "out", adapter_only=True)
    lora_again = replace(context.lora, adapter=str(directory))
    back = make_policy(CONFIG, replace(context, lora=lora_again))
    assert_same_state(back.module.state_dict(), policy.module.state_dict())


def test_peft_reads_an_adapter(tmp_path, adapted):
    directory = exported(adapted, tmp_path / "out", adapter_only=True)
    assert {path.name for path in directory.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    base = make_policy(CONFIG, CONTEXT).module
    wrapped = peft.PeftModel.from_pretrained(base, directory)
    merged = wrapped.merge_and_unload().state_dict()
    expected = dict(lora.merged_state(adapted.module))
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-6)


def test_a_value_head_lies_beside_its_adapter(tmp_path):
    context = replace(CONTEXT, lora=ADAPTERS, values="action")
    policy = trained(context)
    directory = exported(policy, tmp_path / "out", adapter_only=True)
    head = load_file(directory / lora.VALUE_HEAD_WEIGHTS)
    state = policy.module.state_dict()
    assert_same_state(head, {name: state[name] for name in state if "value_head" in name})
    adapter = load_file(directory / "adapter_model.safetensors")
    assert not any("value_head" in name for name in adapter)


def test_without_adapters_there_is_no_adapter(tmp_path):
    with pytest.raises(ConfigError, match="no adapters"):
        export_policy(trained().module, tmp_path, source=None, adapter_only=True)
    assert not list(tmp_path.iterdir())


def test_the_merged_matrix_is_the_sum(tmp_path):
    """The recorded adapter changes patch embeddings, which are convolutions, as well."""
    policy = trained(replace(CONTEXT, lora=replace(ADAPTERS, targets="published")))
    directory = exported(policy, tmp_path / "out")
    merged = load_file(directory / loading.SINGLE)
    untrained = make_policy(CONFIG, CONTEXT).module
    convolutions = [
        f"{name}.weight"
        for name, module in untrained.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    before = untrained.state_dict()
    assert len(convolutions) == 2
    assert all((merged[name] - before[name]).abs().max() > 0.001 for name in convolutions)
