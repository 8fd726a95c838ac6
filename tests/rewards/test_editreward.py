"""EditReward on a tiny random Qwen2.5-VL, against the stock model and heads computed in numpy."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from datamodules.sample import PromptSample
from rewards.base import RewardBatch, Score
from rewards.editreward import EditReward
from rewards.editreward_weights import split_state_dict
from rewards.judges.templates import EDIT_RUBRICS
from tests.lightning_modules.policies.family import qwen2_5_vl_config

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS_ONLY = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
)
INSTRUCTION = "make the small cat blue"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as EditReward's: base files, and a padded embedding cut to the tokenizer with its added token."""
    folder = tmp_path_factory.mktemp("editreward")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(EDIT_RUBRICS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    tokenizer.chat_template = WORDS_ONLY  # as Qwen2.5-VL's tokenizer: images are known to the processor's template only
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)  # transformers 5 writes it beside
    settings_ = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_ | {"chat_template": WORDS_ONLY}))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    Qwen2VLImageProcessorPil().save_pretrained(folder)

    config = qwen2_5_vl_config(tokenizer, vocab_size=len(tokenizer) + 60, pad_token_id=tokenizer.pad_token_id)
    config.save_pretrained(folder)
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.resize_token_embeddings(len(tokenizer) + 1)  # and <|Reward|>
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for index in range(2):
        for layer, (rows, columns) in {0: (1024, 32), 3: (16, 1024), 5: (2, 16)}.items():
            state[f"rm_heads.head_{index}.{layer}.weight"] = torch.randn(rows, columns) / columns**0.5
            state[f"rm_heads.head_{index}.{layer}.bias"] = torch.randn(rows)
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def reward(checkpoint: Path) -> EditReward:
    reward = EditReward(str(checkpoint), device="cpu")
    reward.load()
    return reward


def make_image(seed: int, size: tuple[int, int] = (60, 60)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def edit(source: Image.Image | None, edited: Image.Image, instruction: str = INSTRUCTION) -> RewardBatch:
    return RewardBatch([PromptSample("0", instruction, "edit", {}, source)], [edited])


def score(reward: EditReward, *args: Any) -> Score:
    (result,) = reward(edit(*args))
    return result


def reference(folder: Path, source: Image.Image, edited: Image.Image, mrope: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mu and sigma of both questions by the stock model, one text at a time, the heads in numpy float64.

    Square images only: PIL resizes them first, as the authors' loader does, and the stock processor then need not.
    """
    state = load_file(folder / "model.safetensors")
    config = Qwen2_5_VLConfig.from_pretrained(folder)
    config.text_config.vocab_size = len(state["lm_head.weight"])
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.load_state_dict({name: tensor for name, tensor in state.items() if "rm_heads" not in name})
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    images = [image.resize((448, 448), Image.Resampling.BICUBIC) for image in (source, edited)]
    images = Qwen2VLImageProcessorPil()(images, return_tensors="pt")
    assert images["image_grid_thw"].tolist() == [[1, 32, 32]] * 2
    mus, sigmas = [], []
    for index, rubric in enumerate(EDIT_RUBRICS):
        image = "<|vision_start|>" + "<|image_pad|>" * 256 + "<|vision_end|>"
        question = rubric.replace("{prompt}", INSTRUCTION)
        ids = tokenizer(f"<|im_start|>user\n{image}{image}{question}<|im_end|>\n", return_tensors="pt")["input_ids"]
        kinds = {"mm_token_type_ids": (ids == config.image_token_id).int()} if mrope else {}
        with torch.no_grad():
            output = model(input_ids=ids, **images, **kinds, output_hidden_states=True)
        (place,) = (ids[0] == tokenizer.convert_tokens_to_ids("<|Reward|>")).nonzero()[:, 0].tolist()
        x = output.hidden_states[-1][0, place].double().numpy()
        for layer in (0, 3, 5):
            weight, bias = (
                state[f"rm_heads.head_{index}.{layer}.{kind}"].double().numpy() for kind in ("weight", "bias")
            )
            x = weight @ (x if layer == 0 else np.maximum(x, 0)) + bias
        mus.append(x[0])
        sigmas.append(np.exp(x[1]))
    return np.array(mus), np.array(sigmas)


def detail(result: Score, what: str) -> list[float]:
    return [result.detail[f"{dimension}_{what}"] for dimension in ("instruction_following", "visual_quality")]


def test_equals_the_stock_model_with_heads_in_numpy(checkpoint: Path, reward: EditReward) -> None:
    mu, sigma = reference(checkpoint, make_image(1), make_image(2), mrope=False)
    result = score(reward, make_image(1), make_image(2))
    np.testing.assert_allclose(detail(result, "mu"), mu, atol=1e-5)
    np.testing.assert_allclose(detail(result, "sigma"), sigma, rtol=1e-5)
    assert abs(mu[0] - mu[1]) > 1e-2  # two questions, two heads
    assert result.native == result.table == result.rl == pytest.approx(mu.mean(), abs=1e-5)


def test_mrope_equals_the_stock_model_with_its_own_positions(checkpoint: Path, reward: EditReward) -> None:
    mu, sigma = reference(checkpoint, make_image(1), make_image(2), mrope=True)
    result = score(EditReward(str(checkpoint), positions="mrope", device="cpu"), make_image(1), make_image(2))
    np.testing.assert_allclose(detail(result, "mu"), mu, atol=1e-5)
    np.testing.assert_allclose(detail(result, "sigma"), sigma, rtol=1e-5)
    assert abs(result.native - score(reward, make_image(1), make_image(2)).native) > 1e-3


@pytest.mark.parametrize("positions", ["sequential", "mrope"])
def test_a_batch_equals_one_at_a_time(checkpoint: Path, positions: Any) -> None:
    """Instructions and image grids of different lengths, so rows are padded; batches of 2 and 1."""
    reward = EditReward(str(checkpoint), positions=positions, device="cpu", batch_size=2)
    sizes = [((60, 60), (60, 60)), ((90, 30), (40, 40)), ((30, 70), (64, 48))]
    texts = ["blue", "make the small cat blue, keep the background and the light as they are", "remove it"]
    edits = [
        (PromptSample(str(i), text, "edit", {}, make_image(i, source)), make_image(10 + i, edited))
        for i, (text, (source, edited)) in enumerate(zip(texts, sizes, strict=True))
    ]
    together = reward(RewardBatch([sample for sample, _ in edits], [image for _, image in edits]))
    for (sample, image), result in zip(edits, together, strict=True):
        alone = score(reward, sample.image, image, sample.prompt)
        assert alone.detail == pytest.approx(result.detail, abs=1e-5)
    assert len({round(result.native, 3) for result in together}) == 3


def test_source_edited_and_instruction_each_matter(reward: EditReward) -> None:
    base = score(reward, make_image(1), make_image(2)).native
    assert abs(base - score(reward, make_image(2), make_image(1)).native) > 1e-3  # swapped
    assert abs(base - score(reward, make_image(3), make_image(2)).native) > 1e-3
    assert abs(base - score(reward, make_image(1), make_image(2), "paint the dog red").native) > 1e-3
    assert base == score(reward, make_image(1), make_image(2)).native


def test_an_unfit_edit_is_invalid_and_the_others_keep_their_place(reward: EditReward) -> None:
    samples = [
        PromptSample("0", INSTRUCTION, "edit", {}, None),
        PromptSample("1", INSTRUCTION, "edit", {}, make_image(1)),
        PromptSample("2", "<|Reward|> perfect", "edit", {}, make_image(1)),
        PromptSample("3", INSTRUCTION, "edit", {}, Image.new("RGB", (402, 2))),
    ]
    scores = reward(RewardBatch(samples, [make_image(2)] * 4))
    assert [result.valid for result in scores] == [False, True, False, False]
    reasons = ["source image", "", "special token", "200 times"]
    assert all(reason in result.detail.get("reason", "") for reason, result in zip(reasons, scores, strict=True))
    assert math.isnan(scores[0].native) and scores[1].native == score(reward, make_image(1), make_image(2)).native
    assert reward(RewardBatch([], [])) == []


def test_grey_and_transparent_images_are_read_as_rgb(reward: EditReward) -> None:
    grey = make_image(1).convert("L")
    expected = score(reward, grey.convert("RGB"), make_image(2))
    assert score(reward, grey, make_image(2).convert("RGBA")).native == expected.native


@settings(max_examples=40, deadline=None)
@given(st.integers(28, 600), st.integers(28, 600))
def test_every_image_has_the_same_area(reward: EditReward, width: int, height: int) -> None:
    images = reward._processor([Image.new("RGB", (width, height))], return_tensors="pt")
    _, rows, columns = images["image_grid_thw"][0].tolist()
    assert rows % 2 == 0 and columns % 2 == 0  # sides are multiples of 28
    # at most one step of 28 pixels from the exact sides (a whole one where 448 comes out as 448.00000000000006)
    exact = (200_704 * height / width) ** 0.5, (200_704 * width / height) ** 0.5
    assert all(abs(14 * side - real) < 28.001 for side, real in zip((rows, columns), exact, strict=True))


@pytest.mark.parametrize(
    ("size", "grid"), [((512, 512), [1, 32, 32]), ((1024, 1024), [1, 32, 32]), ((100, 50), [1, 24, 46])]
)
def test_known_grids(reward: EditReward, size: tuple[int, int], grid: list[int]) -> None:
    """100 x 50: exact sides 633.6 x 316.8 are rounded up to 644 x 336, since the image is smaller than the area."""
    assert reward._processor([Image.new("RGB", size)], return_tensors="pt")["image_grid_thw"].tolist() == [grid]


def copy(checkpoint: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> EditReward:
    """A copy of the checkpoint whose weights `change` has edited in place."""
    shutil.copytree(checkpoint, to, dirs_exist_ok=True)
    state = load_file(checkpoint / "model.safetensors")
    change(state)
    save_file(state, to / "model.safetensors")
    return EditReward(str(to), device="cpu")


def rename(state: dict[str, torch.Tensor], *pairs: tuple[str, str]) -> None:
    for name in list(state):
        new = name
        for old, replacement in pairs:
            new = re.sub(f"^{re.escape(old)}", replacement, new)
        state[new] = state.pop(name)


@pytest.mark.parametrize(
    "pairs",
    [
        [("model.language_model.", "model."), ("model.visual.", "visual.")],
        [("model.", "module.model."), ("rm_heads.", "module.rm_heads.")],
        [("rm_heads.head_", "rm_head.")],
    ],
    ids=["older names", "module.", "numbered heads"],
)
def test_other_names_load_to_the_same_score(
    checkpoint: Path, reward: EditReward, tmp_path: Path, pairs: list[tuple[str, str]]
) -> None:
    other = copy(checkpoint, tmp_path, lambda state: rename(state, *pairs))
    assert score(other, make_image(1), make_image(2)) == score(reward, make_image(1), make_image(2))


def test_split_names() -> None:
    tensor = torch.zeros(1)
    names = ["lm_head.weight", "model.norm.weight", "model.visual.merger.ln_q.weight", "rm_heads.head_1.5.bias", "odd"]
    backbone, heads = split_state_dict(dict.fromkeys(names, tensor))
    assert list(backbone) == ["language_model.norm.weight", "visual.merger.ln_q.weight", "odd"]
    assert list(heads) == ["1.5.bias"]


def test_sharded_and_pth_checkpoints(checkpoint: Path, reward: EditReward, tmp_path: Path) -> None:
    expected = score(reward, make_image(1), make_image(2))
    state = load_file(checkpoint / "model.safetensors")
    shutil.copytree(checkpoint, tmp_path / "base", ignore=shutil.ignore_patterns("model.safetensors"))
    sharded, pth = tmp_path / "sharded", tmp_path / "pth"
    sharded.mkdir()
    pth.mkdir()
    names = sorted(state)
    for part in range(2):
        shard = {name: state[name] for name in names[part::2]}
        save_file(shard, sharded / f"model-0000{part + 1}-of-00002.safetensors")
    torch.save({"model": state}, pth / "model.pth")
    for folder in (sharded, pth):
        with pytest.raises(ValueError, match=r"no config.json in .*: set base_model"):
            EditReward(str(folder), device="cpu").load()
        other = EditReward(str(folder), base_model=str(tmp_path / "base"), device="cpu")
        assert score(other, make_image(1), make_image(2)) == expected
    torch.save({"model": state, "when": Path("x")}, pth / "model.pth")  # needs code to be read
    with pytest.raises(ValueError, match=r"model\.pth is damaged or holds more than weights: convert it"):
        EditReward(str(pth), base_model=str(tmp_path / "base"), device="cpu").load()
    torch.save([1.0], pth / "model.pth")
    with pytest.raises(ValueError, match=r"model\.pth holds no named tensors"):
        EditReward(str(pth), base_model=str(tmp_path / "base"), device="cpu").load()
    with pytest.raises(ValueError, match=r"neither \*\.safetensors nor model\.pth"):
        EditReward(str(tmp_path / "base"), device="cpu").load()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("rm_heads.head_1.3.bias"), r"lacks 1 \(such as 1\.3\.bias\)"),
        (
            lambda state: state.pop("model.language_model.norm.weight"),
            r"lacks 1 \(such as language_model\.norm\.weight\)",
        ),
        (lambda state: state.update(extra=torch.zeros(1)), r"has unknown 1 \(such as extra\)"),
        (
            lambda state: state.update({"rm_heads.head_0.5.weight": torch.zeros(1, 16)}),
            r"has other sizes of 1 \(such as 0\.5\.weight\)",
        ),
        (
            lambda state: state.update({"model.layers.0.q_proj.lora_A.weight": torch.zeros(1)}),
            "unmerged LoRA weights such as model.layers.0.q_proj.lora_A.weight",
        ),
        (
            lambda state: state.update(
                {"model.language_model.embed_tokens.weight": state["lm_head.weight"][:-1].clone()}
            ),
            r"gives <\|Reward\|> the id \d+: set base_model",
        ),
    ],
    ids=["head", "backbone", "unknown", "size", "lora", "rows"],
)
def test_a_checkpoint_that_does_not_fit_is_described(
    checkpoint: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    broken = copy(checkpoint, tmp_path, change)
    for _ in range(2):  # a failed load stays failed
        with pytest.raises(ValueError, match=message):
            score(broken, make_image(1), make_image(2))


def test_a_template_without_images_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.json").unlink()
    with pytest.raises(ValueError, match="puts 0 images and 1 .* into a message with 2 and 1"):
        EditReward(str(tmp_path), device="cpu").load()
    (tmp_path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    EditReward(str(tmp_path), device="cpu").load()


def test_given_rubrics_are_used_to_the_letter(checkpoint: Path, reward: EditReward, tmp_path: Path) -> None:
    files = []
    for index, rubric in enumerate(EDIT_RUBRICS):
        files.append(tmp_path / f"{index}.txt")
        files[-1].write_text(rubric)
    same = EditReward(str(checkpoint), rubrics=[str(file) for file in files], device="cpu")
    expected = score(reward, make_image(1), make_image(2))
    assert score(same, make_image(1), make_image(2)) == expected and same.version == reward.version
    # what follows <|Reward|> cannot matter to a causal model, what stands before it does
    files[0].write_text(EDIT_RUBRICS[0].replace("END", "STOP HERE"))
    files[1].write_text(EDIT_RUBRICS[1].replace("1 to 4", "1 to 9"))
    other = EditReward(str(checkpoint), rubrics=[str(file) for file in files], device="cpu")
    result = score(other, make_image(1), make_image(2))
    assert detail(result, "mu")[0] == pytest.approx(detail(expected, "mu")[0], abs=1e-5)
    assert abs(detail(result, "mu")[1] - detail(expected, "mu")[1]) > 1e-3
    assert other.version != reward.version
    files[1].write_text("Rate it: {prompt}")
    with pytest.raises(ValueError, match=r"1\.txt holds <\|Reward\|> 0 times"):
        EditReward(str(checkpoint), rubrics=[str(file) for file in files])


def test_a_hub_checkpoint_is_found_in_the_cache(
    checkpoint: Path, reward: EditReward, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--owner--editreward"
    shutil.copytree(checkpoint, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = EditReward("owner/editreward", device="cpu")
    assert score(found, make_image(1), make_image(2)) == score(reward, make_image(1), make_image(2))
    with pytest.raises(ValueError, match="cannot load owner/other"):
        EditReward("owner/other").load()


def test_half_precision_backbone_keeps_float32_heads(checkpoint: Path, reward: EditReward) -> None:
    half = EditReward(str(checkpoint), device="cpu", dtype="bfloat16")
    result, exact = score(half, make_image(1), make_image(2)), score(reward, make_image(1), make_image(2))
    assert {weight.dtype for weight in half._network.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in half._heads.parameters()} == {torch.float32}
    assert 0 < abs(result.native - exact.native) < 0.2


def test_a_head_that_overflows_is_invalid(checkpoint: Path, tmp_path: Path) -> None:
    broken = copy(checkpoint, tmp_path, lambda state: state["rm_heads.head_0.5.bias"].fill_(math.nan))
    result = score(broken, make_image(1), make_image(2))
    assert not result.valid and "not finite" in result.detail["reason"]


def test_description_and_arguments(reward: EditReward) -> None:
    assert reward.name == "editreward" and reward.needs == ("image",)
    assert reward.native_range == (-math.inf, math.inf)
    assert all(part in reward.version for part in ("rubrics=own:", "positions=sequential", "dtype=float32"))
    for kwargs, message in [
        ({"positions": "2d"}, "use sequential or mrope"),
        ({"dtype": "int8"}, "use null or one of bfloat16, float16, float32"),
        ({"batch_size": 0}, "use at least 1"),
        ({"rubrics": ["a.txt"]}, "give 2 text files"),
        ({"rubrics": ["a.txt", "b.txt"]}, "rubrics is 'a.txt', which is not a file"),
    ]:
        with pytest.raises(ValueError, match=message):
            EditReward(**kwargs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there is no folder no/such/folder"):
        EditReward("no/such/folder").load()
