"""HPSv2.1: the conversion against open_clip's architecture written out in plain torch, and the scores on top of it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from rewards.hps import HPSReward, clip_from_open_clip, letterbox
from tests.rewards.tiny_clip import END, SIZE, START, VOCAB, batch, noise, normalised, reference_ids, save_processor


class Block(nn.Module):
    """Pre-norm attention with one joint input projection, then a GELU network, under open_clip's names."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, hidden))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(hidden, width))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, layers: int, size: int, patch: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, heads, hidden, layers)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, out) / width**0.5)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        x = self.transformer(self.ln_pre(torch.cat([first, patches], 1) + self.positional_embedding))
        return self.ln_post(x[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """What open_clip calls CLIP, at a small size; `heads` of the two towers may differ."""

    def __init__(self, vision: tuple[int, int] = (80, 4), text: tuple[int, int] = (32, 4), out: int = 24) -> None:
        super().__init__()
        self.visual = Visual(*vision, 100, 3, SIZE, 14, out)
        self.transformer = Transformer(*text, 64, 2)
        self.token_embedding = nn.Embedding(len(VOCAB), text[0])
        self.positional_embedding = nn.Parameter(torch.randn(77, text[0]))
        self.ln_final = nn.LayerNorm(text[0])
        self.text_projection = nn.Parameter(torch.randn(text[0], out) / text[0] ** 0.5)
        self.logit_scale = nn.Parameter(torch.tensor(np.log(50.0), dtype=torch.float32))
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "bias" in name or ".ln_" in name:
                    parameter.add_(0.2 * torch.randn_like(parameter))

    def encode_text(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        mask = torch.full((length, length), -torch.inf).triu(1)
        x = self.transformer(self.token_embedding(ids) + self.positional_embedding[:length], mask)
        return self.ln_final(x)[torch.arange(len(ids)), ids.argmax(1)] @ self.text_projection


def padded(texts: list[str]) -> Tensor:
    """[B, 77] ids, zeros after the end of text as open_clip pads."""
    ids = torch.zeros(len(texts), 77, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        tokens = reference_ids(text)
        row[: len(tokens)] = torch.tensor(tokens)
    return ids


@pytest.fixture
def published(tmp_path: Path) -> tuple[OpenClip, str, str]:
    """A file with 16 heads a tower as ViT-H-14 has, and a tokenizer without an image processor."""
    torch.manual_seed(4)
    model = OpenClip(vision=(80, 16), text=(32, 16)).eval()
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "hps.pt")
    save_processor(tmp_path / "processor")
    (tmp_path / "processor" / "preprocessor_config.json").unlink()
    return model, str(tmp_path / "hps.pt"), str(tmp_path / "processor")


@torch.no_grad()
@pytest.mark.parametrize(("vision_heads", "text_heads"), [(4, 4), (16, 8)])
def test_converted_features_are_open_clips(vision_heads: int, text_heads: int) -> None:
    torch.manual_seed(vision_heads)
    reference = OpenClip((80, vision_heads), (32, text_heads)).eval()
    converted = clip_from_open_clip(reference.state_dict(), vision_heads=vision_heads, text_heads=text_heads).eval()
    pixels = torch.randn(3, 3, SIZE, SIZE)
    images, ours = reference.visual(pixels), converted.get_image_features(pixels).pooler_output
    torch.testing.assert_close(ours, images, atol=1e-5, rtol=0)
    ids = padded(["a cat", "a much longer text about many cats", "x " * 100])
    texts, ours = reference.encode_text(ids), converted.get_text_features(ids).pooler_output
    torch.testing.assert_close(ours, texts, atol=1e-5, rtol=0)
    assert images.std(0).min() > 1e-3  # rows differ, so that a mix-up would show
    assert texts.std(0).min() > 1e-3
    assert converted.logit_scale.exp().item() == pytest.approx(50.0)


@torch.no_grad()
def test_the_number_of_heads_matters() -> None:
    """The reason why it is an argument: any divisor of the width loads."""
    reference = OpenClip().eval()
    wrong = clip_from_open_clip(reference.state_dict(), vision_heads=8, text_heads=4).eval()
    pixels = torch.randn(1, 3, SIZE, SIZE)
    assert (wrong.get_image_features(pixels).pooler_output - reference.visual(pixels)).abs().max() > 1e-3


@torch.no_grad()
def test_older_forms_of_the_file() -> None:
    """A mask among the tensors, a scale of rank 1, half precision."""
    model = OpenClip().eval()
    state_dict = {name: tensor.half() for name, tensor in model.state_dict().items()}
    state_dict |= {"attn_mask": torch.zeros(77, 77), "logit_scale": state_dict["logit_scale"].reshape(1)}
    converted = clip_from_open_clip(state_dict, vision_heads=4, text_heads=4)
    assert converted.dtype == torch.float32
    assert converted.logit_scale.shape == ()
    model.load_state_dict(
        {name: t.float() for name, t in state_dict.items() if name != "attn_mask"}
        | {"logit_scale": state_dict["logit_scale"].float().reshape(())}
    )
    pixels = torch.randn(1, 3, SIZE, SIZE)
    features = converted.eval().get_image_features(pixels).pooler_output
    torch.testing.assert_close(features, model.visual(pixels), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("visual.proj", None, "no tensor becomes visual_projection.weight of a CLIP model"),
        ("ln_final.bias", None, "missing keys after conversion: text_model.final_layer_norm.bias"),
        ("logit_bias", torch.zeros(()), "unexpected keys after conversion: logit_bias"),
        ("visual.ln_post.weight", torch.zeros(7), "its tensors do not fit one another"),
    ],
)
def test_other_state_dicts(name: str, change: Tensor | None, sentence: str) -> None:
    state_dict = OpenClip().state_dict()
    if change is None:
        del state_dict[name]
    else:
        state_dict[name] = change
    with pytest.raises(ValueError, match=sentence):
        clip_from_open_clip(state_dict, vision_heads=4, text_heads=4)


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((100, 50), (0, 7, 28, 21)),  # 28 x 14, 7 rows above and below
        ((50, 100), (7, 0, 21, 28)),
        ((28, 28), (0, 0, 28, 28)),
        ((28, 13), (0, 7, 28, 20)),  # 15 rows of padding: 7 above, 8 below
        ((14, 7), (0, 7, 28, 21)),  # enlarged
        ((1000, 1), (0, 13, 28, 14)),  # never thinner than a pixel
    ],
)
def test_letterbox(size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    """A white image fills exactly the box; the rest is black."""
    square = np.asarray(letterbox(Image.new("RGB", size, "white"), 28))
    expected = np.zeros((28, 28, 3))
    left, top, right, bottom = box
    expected[top:bottom, left:right] = 255
    np.testing.assert_array_equal(square, expected)


def test_a_square_is_only_resized() -> None:
    image = noise(64, 64, 1)
    assert letterbox(image, 28) == image.resize((28, 28), Image.Resampling.BICUBIC)


@torch.no_grad()
def test_scores_are_open_clips_cosines(published: tuple[OpenClip, str, str]) -> None:
    """File, tokenizer and preprocessing through the reward, against the reference pair by pair."""
    model, weights, processor = published
    prompts = ["a cat", "a cat", "blue", "x " * 100]
    images = [noise(28, 28, 0), noise(64, 64, 1), noise(56, 28, 2), noise(28, 84, 3)]
    squares = []
    for image, (width, height, left, top) in zip(
        images, [(28, 28, 0, 0), (28, 28, 0, 0), (28, 14, 0, 7), (9, 28, 9, 0)], strict=True
    ):
        square = np.zeros((28, 28, 3), np.uint8)
        resized = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
        square[top : top + height, left : left + width] = resized
        squares.append(normalised(square))
    reference = torch.cosine_similarity(model.visual(torch.stack(squares)), model.encode_text(padded(prompts))).numpy()
    scores = HPSReward(weights, processor, batch_size=3)(batch(prompts, images))
    np.testing.assert_allclose([score.native for score in scores], reference, atol=1e-6)
    assert np.ptp(reference) > 0.05


def test_worth_by_hand() -> None:
    score = HPSReward().score_of(0.25)
    assert (score.native, score.table, score.rl) == (0.25, 25.0, 0.25)
    score = HPSReward(compat="unirl").score_of(0.25)
    assert (score.native, score.table, score.rl) == (0.25, 25.0, 0.5)
    with pytest.raises(ValueError, match="compat='x', use null or unirl"):
        HPSReward(compat="x")  # type: ignore[arg-type]


def test_versions_tell_settings_apart() -> None:
    assert HPSReward().version == (
        "hps by xswu/HPSv2/HPS_v2.1_compressed.pt processor=laion/CLIP-ViT-H-14-laion2B-s32B-b79K float32 compat=None"
    )
    assert HPSReward(compat="unirl").version.endswith("compat=unirl")


def test_a_file_with_more_than_weights(published: tuple[OpenClip, str, str], tmp_path: Path) -> None:
    model, weights, processor = published
    torch.save({"state_dict": model.state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="set `allow_pickle: true` if you trust where it comes from"):
        HPSReward(str(tmp_path / "code.pt"), processor).load()
    trusted = HPSReward(str(tmp_path / "code.pt"), processor, allow_pickle=True)
    one = batch(["a"], [noise(28, 28, 0)])
    assert trusted(one)[0].native == HPSReward(weights, processor)(one)[0].native


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_damaged_files(published: tuple[OpenClip, str, str], tmp_path: Path, allow_pickle: bool) -> None:
    _, weights, processor = published
    data = Path(weights).read_bytes()
    for name, content in {"half.pt": data[: len(data) // 2], "empty.pt": b"", "page.pt": b"<html>"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            HPSReward(str(tmp_path / name), processor, allow_pickle=allow_pickle).load()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"weights": {}}, "has no entry `state_dict`: give HPSv2's own file"),
        ({"state_dict": {}}, "is not HPSv2's ViT-H-14: no tensor becomes"),
    ],
)
def test_files_of_other_models(
    published: tuple[OpenClip, str, str], tmp_path: Path, content: dict[str, Any], sentence: str
) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=sentence):
        HPSReward(str(tmp_path / "other.pt"), published[2]).load()


def test_a_hub_file_from_the_cache(
    published: tuple[OpenClip, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found offline where the hub's client keeps its downloads, by owner/name/file."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "cache" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    Path(published[1]).rename(repository / "snapshots" / ("0" * 40) / "file.pt")
    (score,) = HPSReward("owner/name/file.pt", published[2])(batch(["a"], [noise(28, 28, 0)]))
    assert score.valid
    with pytest.raises(ValueError, match=r"cannot load owner/name/none\.pt: "):
        HPSReward("owner/name/none.pt", published[2]).load()


@pytest.mark.parametrize("weights", ["none.pt", "tests/none.pt", "tests/rewards/none.pt", "/none/none.pt"])
def test_no_such_file(published: tuple[OpenClip, str, str], weights: str) -> None:
    with pytest.raises(ValueError, match=f"there is no file {weights}: give an existing file or owner/name/file"):
        HPSReward(weights, published[2]).load()


def test_the_read_out_token_is_the_last_of_the_vocabulary() -> None:
    converted = clip_from_open_clip(OpenClip().state_dict(), vision_heads=4, text_heads=4)
    text = converted.config.text_config
    assert (text.bos_token_id, text.eos_token_id) == (START, END)
