"""OpenVLA-OFT against numbers recorded from the reference classes.

The recorded network is small and random, and other sets have other sizes: everything that varies is
read from the set.
"""

from __future__ import annotations

import json
import lzma
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from vlactl_openvla_oft import codec, jpeg, l1, loading, self_test
from vlactl_openvla_oft.architecture import (
    BOS_ID,
    CHUNK_LENGTH,
    NUM_BINS,
    Architecture,
    TowerConfig,
    VisionConfig,
)
from vlactl_openvla_oft.model import OpenVlaOft, build, materialise
from vlactl_openvla_oft.official_pictures import OfficialResize
from vlactl_openvla_oft.parts import Blueprint
from vlactl_openvla_oft.policy import OpenVlaOftPolicy
from vlactl_openvla_oft.processor import (
    PUBLISHED_MEANS,
    PUBLISHED_STDS,
    Inputs,
    PictureConfig,
    RlinfResize,
    make_picture_encoder,
    pad_prompt,
    prompt_text,
)
from vlactl_openvla_oft.supervised import supervised_loss
from vlactl_openvla_oft.tokenizer import LLAMA_BLANK_ID, LlamaTokenizer

from vlactl.api.contracts import Greedy, ObservationBatch, Sample, TrainBatch
from vlactl.api.sampling import draw_tokens, token_logprobs

TOLERANCE = 1e-4
CPU = torch.device("cpu")
VALUE_OUTPUTS = {"action_level": CHUNK_LENGTH, "chunk_level": 1}


@dataclass
class Recorded:
    """A recorded checkpoint, its runtime settings and the network made of it."""

    folder: Path
    directory: Path
    runtime: dict
    architecture: Architecture
    module: OpenVlaOft

    def arrays(self, name):
        return dict(np.load(self.folder / f"{name}.npz"))

    def statistics(self):
        known = loading.read_statistics(self.directory)
        return loading.action_statistics(known, self.runtime["unnorm_key"])

    def prompts(self):
        arrays = self.arrays("forward_1img")
        return [arrays[f"prompt_ids_{i}"].tolist() for i in range(len(arrays["prompt_lens"]))]


@pytest.fixture(scope="module")
def recorded(goldens, tmp_path_factory):
    folder = goldens / "openvla_oft"
    directory = tmp_path_factory.mktemp("checkpoint")
    for name in ("config.json", "dataset_statistics.json", "preprocessor_config.json"):
        shutil.copyfile(folder / name, directory / name)
    weights = lzma.decompress((folder / "state_dict.safetensors.xz").read_bytes())
    (directory / "model.safetensors").write_bytes(weights)
    vision = json.loads((folder / "tiny_vision.json").read_text())
    architecture = loading.read_architecture(
        directory,
        vision=vision_config(vision["vit"]),
        value_outputs=VALUE_OUTPUTS[vision["runtime"]["value_type"]],
    )
    module = load(directory, architecture)
    return Recorded(folder, directory, vision["runtime"], architecture, module)


def vision_config(towers):
    names = TowerConfig.__dataclass_fields__.keys() - {"stem"}
    return VisionConfig(
        **{t["role"]: TowerConfig(**{name: t[name] for name in names}) for t in towers}
    )


def load(directory, architecture, *, keep_stop_token=False):
    module = build(architecture, keep_stop_token=keep_stop_token)
    state = loading.read_state(directory, module, device=CPU, dtype=torch.float32, seed=0)
    materialise(module, state)
    return module


def padded(recorded, length):
    pad_id = recorded.architecture.language.pad_token_id
    rows = [pad_prompt(ids, length, pad_id) for ids in recorded.prompts()]
    ids, mask = (torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
    return ids, mask


class RecordedInputs:
    """Hands recorded inputs to the policy, since the rounding of pixels has a test of its own."""

    def __init__(self, case):
        arrays = (case[name] for name in ("pixel_values", "input_ids", "attention_mask"))
        self.inputs = Inputs(*map(torch.from_numpy, arrays))

    def encode(self, batch, device):
        return self.inputs


@pytest.fixture(params=["forward_1img", "forward_2img"])
def case(request, recorded):
    return recorded.arrays(request.param)


@pytest.fixture
def policy(recorded, case):
    blueprint = Blueprint(
        architecture=recorded.architecture,
        pictures=None,
        tokenizer=None,
        statistics={},
        actions=recorded.statistics(),
    )
    return OpenVlaOftPolicy(recorded.module, RecordedInputs(case), blueprint, "full")


@pytest.fixture
def observations(case):
    rows = len(case["input_ids"])
    return ObservationBatch(images={}, state=np.zeros((rows, 1)), instructions=("",) * rows)


def close(actual, expected, tolerance=TOLERANCE):
    if isinstance(actual, torch.Tensor):
        actual = actual.detach().numpy()
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def predict(recorded, case, module=None):
    ids, mask = (torch.from_numpy(case[name]) for name in ("input_ids", "attention_mask"))
    with torch.no_grad():
        return (module or recorded.module)(torch.from_numpy(case["pixel_values"]), ids, mask)


def test_features(recorded, case):
    with torch.no_grad():
        features = recorded.module.vision_backbone(torch.from_numpy(case["pixel_values"]))
        close(features, case["patch_features"])
        close(recorded.module.projector(features), case["projected"])


def test_prompt_layout(recorded, case):
    ids, mask = padded(recorded, recorded.runtime["max_prompt_length"])
    np.testing.assert_array_equal(ids, case["input_ids"])
    np.testing.assert_array_equal(mask, case["attention_mask"])


def test_logits_and_values(recorded, case):
    prediction = predict(recorded, case)
    close(prediction.logits, case["action_logits"])
    close(prediction.values, case["rollout_values"])


def test_hidden_states_before_the_heads(recorded, case):
    captured = []
    hook = recorded.module.language_model.register_forward_hook(
        lambda module, inputs, output: captured.append(output)
    )
    predict(recorded, case)
    hook.remove()
    tail = case["last_hidden_tail57"]
    close(captured[0][:, -tail.shape[1] :], tail)


def test_attention_is_not_causal(recorded):
    case = recorded.arrays("forward_1img")
    if "NEGATIVE_action_logits_if_causal" not in case:
        pytest.skip("this set does not record causal attention")
    causal = case["NEGATIVE_action_logits_if_causal"]
    logits = predict(recorded, case).logits[: len(causal)].numpy()
    assert np.abs(logits - causal).max() > 0.5


def test_greedy_act(recorded, case, policy, observations):
    chunks = policy.act(observations, Greedy(), [0] * len(observations))
    np.testing.assert_array_equal(chunks.tokens_BKA, case["greedy_tokens"])
    close(chunks.actions_BKA, case["greedy_env_actions"], 1e-9)
    close(
        chunks.logprobs_BKA.reshape(len(observations), -1), case["greedy_prev_logprobs_untempered"]
    )
    close(chunks.values_BK, case["rollout_values"])


def test_decoded_actions(recorded, case):
    normalized = codec.decode(case["greedy_tokens"], recorded.architecture.action_end)
    close(normalized, case["greedy_normalized"], 1e-12)
    close(recorded.statistics().unnormalize(normalized), case["greedy_actions"], 1e-9)


@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_evaluate_actions(case, policy, observations, temperature):
    tokens = torch.from_numpy(case["given_tokens"])
    batch = TrainBatch(observations=observations, tokens_SKA=tokens, temperature=temperature)
    with torch.no_grad():
        output = policy.evaluate_actions(batch)
    close(output.logprobs_SKA.flatten(1), case[f"given_logprobs_T{temperature}"])
    close(output.entropy_SKA.flatten(1), case[f"given_entropy_T{temperature}"])
    close(output.values_SK, case["given_values"])


@pytest.mark.parametrize("extra", [1, 9])
def test_padding_does_not_matter(recorded, extra):
    case = recorded.arrays("forward_1img")
    ids, mask = padded(recorded, recorded.runtime["max_prompt_length"] + extra)
    prediction = predict(
        recorded, case | {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    )
    close(prediction.logits, case["action_logits"])
    close(prediction.values, case["rollout_values"])


@pytest.fixture(scope="module")
def with_stop(recorded):
    return load(recorded.directory, recorded.architecture, keep_stop_token=True)


def predict_with_stop(recorded, module):
    """The reference sorts padding to the end; with given positions the order of tokens is free."""
    ids, mask = padded(recorded, recorded.runtime["max_prompt_length"])
    pixels = torch.from_numpy(recorded.arrays("forward_1img")["pixel_values"])
    with torch.no_grad():
        return module(pixels, ids, mask).logits


def test_stop_token_kept(recorded, with_stop):
    case = recorded.arrays("forward_stopkept_1img")
    logits = predict_with_stop(recorded, with_stop)
    close(logits, case["action_logits"])
    np.testing.assert_array_equal(logits.argmax(-1), case["greedy_bins"])
    for temperature in (1.0, 1.6):
        given = torch.from_numpy(case["given_bins"])
        logprobs, entropy = token_logprobs(logits, given, temperature)
        close(logprobs, case[f"given_logprobs_T{temperature}"])
        close(entropy, case[f"given_entropy_T{temperature}"])


def test_best_20(recorded, with_stop):
    """Kept are 20 of the 256 bins; the best of them is the greedy one."""
    case = recorded.arrays("forward_stopkept_1img")
    logits = predict_with_stop(recorded, with_stop)
    greedy = torch.from_numpy(case["greedy_bins"])
    logprobs, entropy = token_logprobs(logits, greedy, 1.6, top_k=20)
    close(logprobs, case["greedy_logprobs_T1.6_topk20"])
    close(entropy, case["entropy_T1.6_topk20"])
    drawn, drawn_logprobs = draw_tokens(logits, Sample(1.6, top_k=20), range(len(logits)))
    assert (logits.gather(-1, drawn[..., None]) >= logits.topk(20).values[..., -1:]).all()
    assert torch.equal(drawn_logprobs, token_logprobs(logits, drawn, 1.6, top_k=20)[0])
    only, _ = draw_tokens(logits, Sample(1.6, top_k=1), range(len(logits)))
    np.testing.assert_array_equal(only, case["greedy_bins"])


def test_gradients(recorded):
    forward, case = recorded.arrays("forward_1img"), recorded.arrays("gradients_1img")
    module = load(recorded.directory, recorded.architecture)
    ids, mask = (torch.from_numpy(forward[name]) for name in ("input_ids", "attention_mask"))
    prediction = module(torch.from_numpy(forward["pixel_values"]), ids, mask)
    bins = torch.from_numpy(forward["given_tokens"]).flatten(1) - recorded.architecture.action_start
    logprobs, _ = token_logprobs(prediction.logits, bins, 1.6)
    advantage = torch.from_numpy(case["advantage"])
    loss = -(logprobs * advantage).mean() + 0.5 * prediction.values.square().mean()
    loss.backward()
    close(loss, case["loss"])
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    total = torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm()
    assert float(total) == pytest.approx(float(case["grad_norm_total"]), rel=TOLERANCE)
    without = {name for name, _ in module.named_parameters()} - gradients.keys()
    assert without == set(case["params_without_grad"].tolist())
    embedding = gradients["language_model.model.embed_tokens.weight"]
    touched = embedding.abs().sum(1).nonzero().flatten()
    np.testing.assert_array_equal(touched, case["grad_embed_rows_nonzero"])
    for key in (key for key in case if key.startswith("grad/")):
        name, _, rows = key.removeprefix("grad/").partition("[")
        gradient = gradients[name]
        if rows:
            first, last = map(int, rows.rstrip("]").split(":"))
            gradient = gradient[first:last]
        error = np.linalg.norm(gradient.numpy() - case[key]) / np.linalg.norm(case[key])
        assert error < TOLERANCE, key


def test_entropy_gradient_is_finite(recorded):
    case = recorded.arrays("forward_1img")
    module = load(recorded.directory, recorded.architecture)
    ids, mask = (torch.from_numpy(case[name]) for name in ("input_ids", "attention_mask"))
    logits = module(torch.from_numpy(case["pixel_values"]), ids, mask).logits
    bins = torch.from_numpy(case["given_tokens"]).flatten(1) - recorded.architecture.action_start
    token_logprobs(logits, bins, 1.0)[1].sum().backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)


def test_pixels(recorded, case):
    """Sums in another order may round a tie the other way: one level of 255, in few pixels."""
    config = loading.read_picture_config(recorded.directory, case["pixel_values"].shape[-1])
    pictures = [recorded.arrays("forward_1img")["main_images"]]
    pictures += [case["wrist_images"]] if "wrist_images" in case else []
    pixels = make_picture_encoder("rlinf", config, CPU, torch.float32).encode(pictures).numpy()
    level = np.tile(1 / (255 * np.ravel(config.stds)), len(pictures))[:, None, None]
    off = np.abs(pixels - case["pixel_values"]) / level
    assert off.max() < 1.01
    assert (off > 0.01).mean() <= 0.005


@pytest.fixture
def camera(recorded):
    """Recorded pictures, and what the simulator gave, turned upright: uint8 [1, H, W, 3]."""
    case = recorded.arrays("image_preproc")
    return case, np.ascontiguousarray(case["raw_256"][::-1, ::-1])[None]


def picture_config(size):
    return PictureConfig(size=size, means=PUBLISHED_MEANS, stds=PUBLISHED_STDS)


def channels_last(levels):
    return levels[0].permute(1, 2, 0).numpy()


def test_resize_of_a_camera_picture(camera):
    case, picture = camera
    size = case["rlinf_resized_u8"].shape[0]
    resized = channels_last(RlinfResize(size, CPU)(picture))
    off = np.abs(resized - case["rlinf_resized_u8"])
    assert off.max() <= 1
    assert (off.max(axis=-1) > 0).mean() <= 0.005
    encoder = make_picture_encoder("rlinf", picture_config(size), CPU, torch.float32)
    pixels = encoder.encode([picture])[0].numpy()
    close(
        pixels.mean(axis=(1, 2)), case["rlinf_pixel_values_channel_mean"].astype(np.float32), 1e-3
    )
    strided = np.abs(pixels[:, ::8, ::8] - case["rlinf_pixel_values_stride8"])
    assert (strided > TOLERANCE).mean() <= 0.005


def test_official_pictures_step_by_step(camera):
    """TensorFlow's arrays, every third pixel; Pillow's road without a crop is nobody's dialect."""
    case, picture = camera
    size = case["rlinf_resized_u8"].shape[0]
    resize = OfficialResize(size, CPU)
    raw = torch.from_numpy(picture).permute(0, 3, 1, 2)
    decoded = jpeg.recompress(raw)
    np.testing.assert_array_equal(channels_last(decoded)[::3, ::3], case["tf_jpeg_decoded_stride3"])
    for levels, name in (
        (resize.shrink(decoded), "tf_jpeg_lanczos_224_stride3"),
        (resize.crop(raw), "tf_crop_only_256_to_224_stride3"),
        (resize(picture), "tf_jpeg_lanczos_224_crop_stride3"),
    ):
        off = np.abs(channels_last(levels)[::3, ::3] - case[name])
        assert off.max() <= 1, name
        assert (off > 0).mean() <= 0.005, name


def test_official_pixels(camera):
    case, picture = camera
    config = picture_config(case["rlinf_resized_u8"].shape[0])
    encoder = make_picture_encoder("official", config, CPU, torch.float32)
    pixels = encoder.encode([picture, picture])[0].numpy()
    level = 1 / (255 * np.ravel(config.stds))[:, None, None]
    for both in (pixels[:6], pixels[6:]):
        off = np.abs(both[:, ::8, ::8] - case["eval_crop_pixel_values_stride8"]) / level
        assert off.max() < 1.01
        assert (off > 0.01).mean() <= 0.005


def test_action_codec(recorded):
    case, end = recorded.arrays("action_codec"), recorded.architecture.action_end
    assert len(case["all_ids"]) == NUM_BINS
    np.testing.assert_array_equal(codec.encode(case["values"], end), case["token_ids"])
    close(codec.decode(case["all_ids"], end), case["all_ids_decoded"], 1e-12)
    close(codec.decode(case["odd_ids"], end), case["odd_ids_decoded"], 1e-12)
    actions = recorded.statistics().unnormalize(case["normalized"])
    close(actions, case["unnormalized"], 1e-12)
    close(codec.to_simulator(actions), case["env_actions"], 1e-12)


def test_state_codec(recorded):
    case = recorded.arrays("action_codec")
    known = loading.read_statistics(recorded.directory)
    states = loading.state_statistics(known, recorded.runtime["unnorm_key"])
    close(states.normalize(case["proprio"]), case["proprio_normalized"], 1e-12)


@pytest.mark.parametrize(("stop", "name"), [(True, "loss"), (False, "loss_no_stop")])
def test_supervised_loss(recorded, with_stop, stop, name):
    """The reference pads on the right; see `predict_with_stop`."""
    case, forward = recorded.arrays("sft_1img"), recorded.arrays("forward_1img")
    tokens = case["input_ids"][case["all_actions_mask"]].reshape(len(case["input_ids"]), -1)
    ids, mask = padded(recorded, recorded.runtime["max_prompt_length"])
    inputs = Inputs(torch.from_numpy(forward["pixel_values"]), ids, mask)
    with torch.no_grad():
        loss = supervised_loss(with_stop, inputs, torch.from_numpy(tokens), predict_stop_token=stop)
    close(loss, case[name])


@pytest.mark.parametrize("num_pictures", [1, 2])
def test_the_recorded_network_passes_the_self_test(recorded, num_pictures):
    self_test.check(recorded.module, num_pictures=num_pictures)


@pytest.fixture(scope="module")
def regression(recorded, with_stop):
    extras = lzma.decompress((recorded.folder / "l1_extras.safetensors.xz").read_bytes())
    (recorded.directory / l1.EXTRAS).write_bytes(extras)
    network = l1.surround(with_stop, recorded.architecture.language.hidden_size)
    extras = l1.read_extras(recorded.directory)
    l1.add_extras(network, extras, recorded.directory, CPU, torch.float32)
    return network.requires_grad_(False)


def one_at_a_time(recorded):
    """Inputs of each recorded sample, and its number."""
    forward = recorded.arrays("forward_2img")
    case = recorded.arrays("official_predict_2img")
    names = ("pixel_values", "input_ids", "attention_mask")
    for i in range(sum(name.startswith("l1_hidden_") for name in case)):
        yield i, [torch.from_numpy(forward[name][i : i + 1]) for name in names]


def test_regression_head(recorded, regression):
    case = recorded.arrays("official_predict_2img")
    state = torch.from_numpy(case["proprio_normalized_input"]).float()[None]
    for i, inputs in one_at_a_time(recorded):
        token = regression.proprio_projector(state)
        hidden = regression.vla.hidden_states(*inputs, extra_tokens=token)
        close(hidden, case[f"l1_hidden_{i}"])
        normalized = regression(*inputs, state)
        close(normalized[0], case[f"l1_normalized_{i}"])
        actions = recorded.statistics().unnormalize(normalized[0].double().numpy())
        close(actions, case[f"l1_actions_{i}"])


def test_tokens_of_the_whole_vocabulary(recorded, with_stop):
    """Without a head the reference takes the best of all ids, and the nearest bin of that."""
    case = recorded.arrays("official_predict_2img")
    for i, inputs in one_at_a_time(recorded):
        with torch.no_grad():
            hidden = with_stop.hidden_states(*inputs)
            ids = with_stop.language_model.vocabulary_logits(hidden)[0].argmax(-1).numpy()
        normalized = codec.decode(ids, recorded.architecture.action_end).reshape(CHUNK_LENGTH, -1)
        actions = recorded.statistics().unnormalize(normalized)
        close(actions, case[f"discrete_unmasked_actions_{i}"], 1e-9)


def prompt_records(goldens):
    suites = json.loads((goldens / "openvla_oft" / "prompt_tokens.json").read_text())
    return [record for records in suites.values() for record in records]


def test_prompt_text(goldens):
    for record in prompt_records(goldens):
        assert prompt_text(record["task"]) == record["prompt"]
        assert (record["ids"][0], record["ids"][-1]) == (BOS_ID, LLAMA_BLANK_ID)


@pytest.mark.skipif(
    "VLACTL_LLAMA_TOKENIZER" not in os.environ,
    reason="VLACTL_LLAMA_TOKENIZER names no tokenizer.json of Llama-2",
)
def test_prompt_ids(goldens):
    """A blank at the end of the text gives the same ids as one put behind them by hand."""
    path = Path(os.environ["VLACTL_LLAMA_TOKENIZER"])
    tokenizer, plain = LlamaTokenizer(path), Tokenizer.from_file(str(path))
    for record in prompt_records(goldens):
        assert tokenizer.encode(record["prompt"]) == record["ids"]
        without_blank = plain.encode(record["prompt"].removesuffix(" ")).ids
        assert [*without_blank, LLAMA_BLANK_ID] == record["ids"]
