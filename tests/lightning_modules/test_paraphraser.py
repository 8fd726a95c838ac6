"""Wordings by the shipped refiner: written once, kept, continued, and told apart by all that decides them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image

from datamodules.base import PromptSample
from datamodules.paraphrases.base import Paraphraser
from datamodules.paraphrases.files import FileParaphrases
from lightning_modules.paraphraser import WrittenParaphrases
from lightning_modules.policies.base import LoRA
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.policies.templates import GENERAL

pytestmark = pytest.mark.slow

MakeLanguage = Callable[..., LanguagePolicy]


def writer(**kwargs: Any) -> LanguagePolicy:
    defaults = {"template": "{prompt}", "eval_max_new_tokens": 32, "dtype": "float32", "learning_rate": None}
    return LanguagePolicy("miniature/language", **(defaults | kwargs))


class Counting(LanguagePolicy):
    """Counts how often it was loaded and what it was asked."""

    loads = 0
    asked: tuple[str, ...] = ()
    stop_after: int | None = None

    def load(self) -> None:
        self.loads += 1
        super().load()

    def _write(self, samples: Any, *args: Any, **kwargs: Any) -> Any:
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked += tuple(sample.id for sample in samples)
        return super()._write(samples, *args, **kwargs)


def counting() -> Counting:
    return Counting(
        "miniature/language", template="{prompt}", eval_max_new_tokens=32, dtype="float32", learning_rate=None
    )


def test_greedy_wordings_are_the_rewrites(
    make_language: MakeLanguage, samples: list[PromptSample], tmp_path: Path
) -> None:
    cache = tmp_path / "deep" / "w.jsonl"
    source = WrittenParaphrases(writer(), kind="enhanced", cache=str(cache), batch_size=4)
    assert source.missing("geneval", samples) and source.kinds == ("enhanced",) and not source.refined
    found = source.write("geneval", samples)
    assert found == {"enhanced": make_language().rewrite(samples)}
    assert not source.missing("geneval", samples) and source.writer.network is None
    lines = [json.loads(line) for line in cache.read_text().splitlines()]
    assert [(line["id"], line["set"], line["original"], line["model"]) for line in lines] == [
        (sample.id, "geneval", sample.prompt, "miniature/language") for sample in samples
    ]
    assert all(line["formatted"] and line["seed"] is None and line["template"] == "{prompt}" for line in lines)
    # What it leaves is a file of paraphrases like any other.
    assert FileParaphrases(str(cache)).write("geneval", samples) == {"file": found["enhanced"]}


def test_an_adapter_is_part_of_what_a_line_is_told_apart_by(samples: list[PromptSample], tmp_path: Path) -> None:
    """Also after loading has put the base model in its place."""
    base = writer(lora=LoRA(rank=2), learning_rate=1e-4)
    base.load()
    base.save_pretrained(tmp_path / "lora")
    cache = tmp_path / "w.jsonl"
    for policy, more in (
        (writer(), {}),
        (LanguagePolicy(str(tmp_path / "lora"), "{prompt}", dtype="float32", learning_rate=None), {}),
        (writer(lora=LoRA(path=str(tmp_path / "lora"))), {"lora": str(tmp_path / "lora")}),
    ):
        source = WrittenParaphrases(policy, cache=str(cache), kind="enhanced")
        model = policy.model
        assert source.missing("geneval", samples)
        source.write("geneval", samples)
        assert not source.missing("geneval", samples)
        line = json.loads(cache.read_text().splitlines()[-1])
        assert line["model"] == model and {"lora": line["settings"].get("lora")} == ({"lora": None} | more)


def test_the_writer_is_loaded_only_for_what_is_missing(samples: list[PromptSample], tmp_path: Path) -> None:
    policy = counting()
    source = WrittenParaphrases(policy, cache=str(tmp_path / "w.jsonl"))
    first = source.write("geneval", samples[:4])
    assert source.write("geneval", samples[:4]) == first and policy.loads == 1
    everything = source.write("geneval", samples)
    assert policy.loads == 2 and policy.asked == tuple(sample.id for sample in samples)
    assert everything["written"][:4] == first["written"]


def test_a_killed_run_continues(samples: list[PromptSample], tmp_path: Path) -> None:
    policy, cache = counting(), tmp_path / "w.jsonl"
    policy.stop_after = 4
    with pytest.raises(KeyboardInterrupt):
        WrittenParaphrases(policy, cache=str(cache), batch_size=2).write("geneval", samples)
    assert len(cache.read_text().splitlines()) == 4 and policy.network is None
    cache.write_text(cache.read_text()[:-30])  # the last line was being written
    again = counting()
    source = WrittenParaphrases(again, cache=str(cache), batch_size=2)
    found = source.write("geneval", samples)
    assert again.asked == tuple(sample.id for sample in samples[3:])
    assert found == WrittenParaphrases(writer(), cache=str(tmp_path / "other.jsonl")).write("geneval", samples)
    assert len(cache.read_text().splitlines()) == 6
    # A whole line without a line feed at its end is one all the same.
    cache.write_text("\n".join(cache.read_text().splitlines()[:5]))
    assert source.write("geneval", samples) == found and again.asked[3:] == (samples[5].id,)
    assert not source.missing("geneval", samples)


def test_drawn_wordings_depend_on_seed_and_prompt_alone(samples: list[PromptSample], tmp_path: Path) -> None:
    state = torch.get_rng_state()
    drawn = WrittenParaphrases(writer(), cache=str(tmp_path / "a.jsonl"), num=2, seed=1).write("geneval", samples)
    assert list(drawn) == ["written_1", "written_2"] and drawn["written_1"] != drawn["written_2"]
    other = WrittenParaphrases(writer(), cache=str(tmp_path / "b.jsonl"), num=2, seed=1)
    backwards = other.write("geneval", samples[::-1])
    assert {kind: wordings[::-1] for kind, wordings in backwards.items()} == drawn
    one = WrittenParaphrases(writer(), cache=str(tmp_path / "a.jsonl"), seed=1)
    assert not one.missing("geneval", samples)  # the first of two is the only one of one
    assert one.write("geneval", samples)["written"] == drawn["written_1"]
    another = WrittenParaphrases(writer(), cache=str(tmp_path / "a.jsonl"), num=2, seed=2)
    assert another.missing("geneval", samples) and another.write("geneval", samples) != drawn
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "change",
    [
        {"template": "draw {prompt}"},
        {"eval_max_new_tokens": 31},
        {"dtype": "bfloat16"},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_lines_of_other_settings_are_not_used(
    samples: list[PromptSample], tmp_path: Path, change: dict[str, Any]
) -> None:
    cache = str(tmp_path / "w.jsonl")
    WrittenParaphrases(writer(), cache=cache).write("geneval", samples)
    assert not WrittenParaphrases(writer(temperature=0.5), cache=cache).missing("geneval", samples)  # greedy has none
    assert WrittenParaphrases(writer(**change), cache=cache).missing("geneval", samples)
    assert WrittenParaphrases(writer(), cache=cache, seed=0).missing("geneval", samples)
    assert WrittenParaphrases(writer(), cache=cache).missing("ocr", samples)
    changed = [PromptSample(samples[0].id, "a photo of a cross", "single_object", {})]
    assert WrittenParaphrases(writer(), cache=cache).missing("geneval", changed)


def test_a_writer_that_sees_has_a_wording_for_each_image(tmp_path: Path) -> None:
    """`Counting` stands for any policy that may read images; the plain one never looks at them."""
    first, second = (
        PromptSample("0", "a red circle", "edit", {}, Image.new("RGB", (4, 4), c)) for c in ("red", "blue")
    )
    cache = str(tmp_path / "w.jsonl")
    seeing = WrittenParaphrases(counting(), cache=cache)
    assert seeing.sees_images and not WrittenParaphrases(writer()).sees_images
    seeing.write("edit", [first])
    assert not seeing.missing("edit", [first]) and seeing.missing("edit", [second])
    text_alone = WrittenParaphrases(writer(), cache=cache)
    text_alone.write("edit", [first])
    assert not text_alone.missing("edit", [second])


def test_unanswered_prompts_have_no_wording(samples: list[PromptSample], tmp_path: Path) -> None:
    """With 8 tokens some answers of this refiner are whole and others cut off; with 3 none is whole."""
    cache = tmp_path / "w.jsonl"
    found = WrittenParaphrases(writer(eval_max_new_tokens=8), cache=str(cache)).write("geneval", samples)["written"]
    lines = [json.loads(line) for line in cache.read_text().splitlines()]
    assert {line["formatted"] for line in lines} == {True, False}
    assert [wording is None for wording in found] == [not line["formatted"] for line in lines]
    as_it_is = WrittenParaphrases(writer(eval_max_new_tokens=8), cache=str(cache), checked=False)
    assert as_it_is.write("geneval", samples)["written"] == [line["paraphrase"] for line in lines]
    with pytest.raises(ValueError, match=r"none of the 6 answers of miniature/language holds <answer> </answer>"):
        WrittenParaphrases(writer(eval_max_new_tokens=3), cache=str(cache)).write("geneval", samples)
    whole = WrittenParaphrases(writer(eval_max_new_tokens=3), cache=str(cache), checked=False)
    assert all(whole.write("geneval", samples)["written"])


def test_a_prompt_given_back_is_no_wording(samples: list[PromptSample], tmp_path: Path) -> None:
    cache = tmp_path / "w.jsonl"
    source = WrittenParaphrases(writer(), cache=str(cache))
    source.write("geneval", samples)
    lines = [json.loads(line) for line in cache.read_text().splitlines()]
    lines[2]["paraphrase"] = samples[2].prompt
    cache.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [wording is None for wording in source.write("geneval", samples)["written"]] == [i == 2 for i in range(6)]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ('{"id": "0"}\n', r"w\.jsonl:1: `paraphrase` is None"),
        ('\n{"id": \n{}\n', r"w\.jsonl:2: not valid JSON"),
        ('{"id": "0", "paraphrase": "x"}\n', r"w\.jsonl:1: no line of WrittenParaphrases: name another file"),
    ],
)
def test_a_broken_line_is_named(samples: list[PromptSample], tmp_path: Path, content: str, error: str) -> None:
    (tmp_path / "w.jsonl").write_text(content)
    with pytest.raises(ValueError, match=error):
        WrittenParaphrases(writer(), cache=str(tmp_path / "w.jsonl")).write("geneval", samples)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="set `learning_rate: null`"):
        WrittenParaphrases(writer(learning_rate=1e-6))
    with pytest.raises(ValueError, match="greedy wordings are all the same: set `seed`"):
        WrittenParaphrases(writer(), num=2)
    with pytest.raises(ValueError, match="`batch_size` 0, use at least 1"):
        WrittenParaphrases(writer(), batch_size=0)


def test_from_a_config_without_loading_anything() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--source", type=Paraphraser)
    language = {"class_path": "lightning_modules.policies.language.LanguagePolicy"}
    language |= {"init_args": {"model": "some/model", "learning_rate": None}}  # type: ignore[dict-item]
    init = {"writer": language, "kind": "static_pe", "checked": False}
    path = "lightning_modules.paraphraser.WrittenParaphrases"
    config = parser.parse_object({"source": {"class_path": path, "init_args": init}})
    source = parser.instantiate(config).source
    assert isinstance(source, WrittenParaphrases) and source.writer.template == GENERAL and not source.checked
    assert source.path("geneval") == Path("paraphrases/geneval.static_pe.jsonl")
