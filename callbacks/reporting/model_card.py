"""The model card of an export: code that loads it and draws with it, sampling settings, and results."""

from __future__ import annotations

import inspect
import math
import pprint
from pathlib import Path
from typing import Any

import diffusers
import yaml
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from callbacks.reporting.tables import escape_markdown
from lightning_modules.evaluation import MODES, EvaluatedAgents, EvaluationBatch
from lightning_modules.policies.flow import FlowPolicy
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.policies.loading import absent_parts
from lightning_modules.policies.pipeline import PipelinePolicy
from lightning_modules.policies.qwen_image_edit import QwenImageEditPolicy

PAPER = "https://arxiv.org/abs/2602.01382"

HOW = {
    (True, True): "trained by LoRA adapters",
    (True, False): "trained with all its weights",
    (False, True): "not trained here, with the LoRA in this folder",
    (False, False): "not trained, so not in this folder",
}


def model_card(
    agents: EvaluatedAgents,
    step: int,
    *,
    where: str,
    results: dict[str, Any] | None,
    configured: bool,
    samples: EvaluationBatch | None,
) -> str:
    """Writes the card as Markdown with front matter.

    Args:
        agents: the policies that are exported.
        step: number of optimizer steps so far.
        where: Python expression of the export's folder, for `loading_code`.
        results: contents of `results.json`; None without a benchmark.
        configured: True if a `config.yaml` lies beside the card.
        samples: prompts whose images lie beside the card as `samples/<number>_<mode>.png`; None without any.
    """
    prompt = "..." if samples is None else samples.samples[0].asked
    flow, language = agents.flow, agents.language
    parts = [
        _front_matter(flow, language),
        "# PromptRL export",
        f"Trained by [PromptRL]({PAPER}). Optimizer steps: {step:,}; images drawn for them: {agents.num_rollouts:,}.",
        "\n".join(_described(flow, language)),
    ]
    if samples is not None:
        parts += ["## Samples", "Held-out prompts of the last evaluation; a row has one noise.", _samples(samples)]
    parts += [
        "## Load",
        f"It runs in any folder{_relative_note(flow, language)}:",
        f"```python\n{loading_code(flow, language, where)}\n```",
        "## Draw",
        f"```python\n{drawing_code(flow, language, prompt)}\n```",
    ]
    if language is not None:
        parts += ["## The refiner's template", f"````text\n{language.template}\n````"]
    parts += ["## Sampling", _sampling(flow, language)]
    tables = _tables(results or {})
    if tables:
        parts += ["## Results", *tables]
    if configured:
        parts += ["## Configuration", "All settings of the run: [config.yaml](config.yaml)."]
    return "\n\n".join(parts) + "\n"


def loading_code(flow: FlowPolicy, language: LanguagePolicy | None, where: str = "'.'") -> str:
    """Returns Python code that loads `pipe` and, with a refiner, `tokenizer` and `refiner` from an export.

    Args:
        flow: the image model.
        language: the refiner, or None.
        where: Python expression of the export's folder; one that calls `snapshot_download` gets the import.
    """
    pipeline, stock = _stock_pipeline(flow), _stock_language(language)
    lines = ["import torch", f"from diffusers import {pipeline}"]
    if language is not None:
        lines.append(f"from transformers import {', '.join(sorted([stock, 'AutoTokenizer', 'GenerationConfig']))}")
        if language.adapted:
            lines.append("from peft import PeftModel")
    if where.startswith("snapshot_download"):
        lines.append("from huggingface_hub import snapshot_download")
    flow_export, language_export = 'f"{export}/flow"', 'f"{export}/language"'
    source = flow_export if flow.trained and not flow.adapted else repr(flow.base)
    # Stock pipelines want to be told of the optional parts that a folder lacks, such as SD3's T5.
    absent = "".join(f", {name}=None" for name in absent_parts(flow.model))
    lines += ["", f"export = {where}", f"pipe = {pipeline}.from_pretrained({source}, torch_dtype={flow.dtype}{absent})"]
    if flow.adapted:
        lines.append(f"pipe.load_lora_weights({flow_export})")
    policy: Any = flow
    ours, theirs = policy.scheduler(), policy.pipe.scheduler
    if type(ours) is not type(theirs):
        name = type(ours).__name__
        lines[1] = f"from diffusers import {', '.join(sorted([name, pipeline]))}"
        lines.append(f"pipe.scheduler = {name}({ours.config.num_train_timesteps}, shift={ours.config.shift})")
    if language is not None:
        source = language_export if language.trained and not language.adapted else repr(language.base)
        tokens = language_export if language.trained or language.adapted else repr(language.base)
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({tokens})")
        lines.append(f"refiner = {stock}.from_pretrained({source}, dtype={language.dtype})")
        # What a model's own generation config may warp is switched off, as in training.
        lines.append(f"refiner.generation_config = GenerationConfig(eos_token_id={language.eos_token_ids})")
        if language.adapted:
            lines.append(f"refiner = PeftModel.from_pretrained(refiner, {language_export})")
    return "\n".join(lines)


def drawing_code(flow: FlowPolicy, language: LanguagePolicy | None, prompt: str = "...") -> str:
    """Returns Python code that draws `image` from `prompt`, after `loading_code`, and saves it."""
    lines = [f"prompt = {prompt!r}"]
    if language is not None:
        sees = getattr(language, "see_source", False)
        options = "".join(f", {name}={value!r}" for name, value in language.chat_template_kwargs.items())
        lines = [
            "import re",
            "",
            *lines,
            f'template = """{_quoted(language.template)}"""',
            *["# It reads the prompt alone here; in training it saw the image to edit."] * sees,
            'chat = [{"role": "user", "content": template.replace("{prompt}", prompt)}]',
            f"text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True{options})",
            'asked = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(refiner.device)',
            f"tokens = refiner.generate(**asked, max_new_tokens={language.eval_max_new_tokens}, do_sample=False)",
            'answer = tokenizer.decode(tokens[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)',
            'answer = answer.split("</think>")[-1].split("<think>")[0]',
            'found = re.findall(r"<answer>(.*?)</answer>", answer, re.DOTALL)',
            'prompt = (found[-1] if found else re.sub("</?answer>", "", answer)).strip() or prompt',
        ]
    arguments = pprint.pformat(call_arguments(flow), sort_dicts=False, width=100)
    lines.append(f"arguments = {arguments}")
    if isinstance(flow, QwenImageEditPolicy):  # draws from nothing but an image
        lines.append("from PIL import Image")
        lines.append('arguments["image"] = Image.new("RGB", (512, 512))  # the image to edit: Image.open(...)')
    elif type(flow).encode_sources is not PipelinePolicy.encode_sources:  # type: ignore[attr-defined]
        lines.append('# To edit an image: arguments["image"] = PIL.Image.open(...)')
    return "\n".join([*lines, "image = pipe(prompt=prompt, **arguments).images[0]", 'image.save("image.png")'])


def call_arguments(flow: FlowPolicy) -> dict[str, Any]:
    """Returns the arguments with which the stock pipeline draws as evaluation does, as far as it takes them."""
    takes = inspect.signature(getattr(diffusers, _stock_pipeline(flow)).__call__).parameters
    has = vars(flow) | {name: getattr(flow, name, None) for name in ("guidance_scale", "negative_prompt")}
    wanted = {
        "height": flow.height,
        "width": flow.width,
        "max_area": flow.height * flow.width,  # Kontext scales the two above to it
        "num_inference_steps": flow.sampling.eval_steps or flow.sampling.num_steps,
        "negative_prompt": has["negative_prompt"] or None,
        "use_resolution_binning": False,
    }
    # FLUX.1 calls its embedded guidance guidance_scale; pipelines with a true_cfg_scale mean that by the usual one.
    if "guidance" in has:
        wanted["guidance_scale"] = has["guidance"]
    else:
        wanted["true_cfg_scale" if "true_cfg_scale" in takes else "guidance_scale"] = has["guidance_scale"]
    for name in ("cfg_normalization", "max_sequence_length", "text_encoder_out_layers"):
        wanted[name] = has.get(name)
    arguments = {name: value for name, value in wanted.items() if name in takes and value is not None}
    if has.get("auto_resize") is False:
        arguments["_auto_resize"] = False
    if has.get("complex_human_instruction", True) is not True:
        arguments["complex_human_instruction"] = has["complex_human_instruction"] or None
    return arguments


def _front_matter(flow: FlowPolicy, language: LanguagePolicy | None) -> str:
    agents = [agent for agent in (flow, language) if agent is not None]
    trained = [agent for agent in agents if agent.trained]
    # The card's readers know hub ids only; a folder of this machine would mean nothing, or another model, to them.
    bases = [agent.model for agent in agents if not Path(agent.model).is_dir()]
    about: dict[str, Any] = {"base_model": bases} if bases else {}
    adapted = [agent.adapted for agent in agents]
    if bases and len({agent.adapted for agent in trained}) == 1:
        about["base_model_relation"] = "adapter" if trained[0].adapted else "finetune"
    about["library_name"] = "diffusers" if flow.trained else "peft" if adapted[-1] else "transformers"
    about["tags"] = ["text-to-image", "reinforcement-learning", "promptrl"] + ["lora"] * any(adapted)
    comment = "# license: yours to choose, within those of the base models"
    return f"---\n{yaml.safe_dump(about, sort_keys=False)}{comment}\n---"


def _described(flow: FlowPolicy, language: LanguagePolicy | None) -> list[str]:
    return [
        f"- {name}: {agent.model}, {HOW[agent.trained, agent.adapted]}"
        for name, agent in (("image model", flow), ("prompt refiner", language))
        if agent is not None
    ]


def _relative_note(flow: FlowPolicy, language: LanguagePolicy | None) -> str:
    """Returns a remark on base models that are local folders of the training machine; empty without any."""
    agents = [agent for agent in (flow, language) if agent is not None and (agent.adapted or not agent.trained)]
    folders = [f"`{agent.base}`" for agent in agents if Path(agent.base).is_dir()]
    return f" ({', '.join(folders)} being where training found the base)" if folders else ""


def _sampling(flow: FlowPolicy, language: LanguagePolicy | None) -> str:
    sampling = flow.sampling
    rows = [
        ("rollouts: sampler steps", sampling.num_steps),
        ("rollouts: SDE steps", sampling.sde_steps),
        ("rollouts: SDE, noise level", f"{sampling.sde_type}, {sampling.noise_level}"),
        ("evaluation: sampler steps, no noise", sampling.eval_steps or sampling.num_steps),
        ("image", f"{flow.height} x {flow.width} (height x width)"),
    ]
    if language is not None:
        rows += [
            ("rollouts: refiner", f"temperature {language.temperature}, {language.max_new_tokens} tokens"),
            ("evaluation: refiner", f"greedy, {language.eval_max_new_tokens} tokens"),
        ]
    return "\n".join(["| setting | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _samples(batch: EvaluationBatch) -> str:
    """Makes a Markdown table of prompts with their images, and of rewrites where there are some."""
    heads = ["prompt", *(mode.replace("_", " ").replace("pe", "PE") for mode in batch.images)]
    heads += ["rewrite"] * ("with_pe" in batch.images)
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for number, sample in enumerate(batch.samples):
        cells = [escape_markdown(sample.asked)]
        cells += [f'<img src="samples/{number}_{mode}.png" width="160">' for mode in batch.images]
        cells += [escape_markdown(batch.prompts[mode][number]) for mode in batch.images if mode == "with_pe"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _tables(results: dict[str, Any]) -> list[str]:
    """Makes one Markdown table for each evaluation set: scores before and after training, in each mode."""
    before: dict[str, Any] = results.get("before", {})
    tables = []
    for name, modes in results.items():
        if not isinstance(modes, dict) or MODES[0] not in modes:  # what is not an evaluation set's
            continue
        trained = before.get(name, modes) != modes
        shown = [mode for mode in MODES if mode in modes]
        when = ("before", "after") if trained else ("",)
        heads = [f"{mode.replace('_', ' ').replace('pe', 'PE')} {w}".strip() for mode in shown for w in when]
        rows = [f"| {name} | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
        for score in modes[shown[0]]:
            sources = [source for mode in shown for source in ([before[name][mode]] * trained + [modes[mode]])]
            rows.append(f"| {score} | {' | '.join(_number(source.get(score)) for source in sources)} |")
        tables.append("\n".join(rows))
    return tables


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.3f}"


def _stock_pipeline(flow: FlowPolicy) -> str:
    """Returns the name of the diffusers class that the policy's pipeline is, or is a subclass of."""
    pipeline: Any = getattr(flow, "pipeline_class")  # noqa: B009 (FlowPolicy itself has none)
    return next(kind.__name__ for kind in pipeline.__mro__ if hasattr(diffusers, kind.__name__))


def _stock_language(language: LanguagePolicy | None) -> str:
    text_alone = language is None or language.causal_lm.config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return "AutoModelForCausalLM" if text_alone else "AutoModelForImageTextToText"


def _quoted(text: str) -> str:
    """Escapes a text for Python's triple quotes."""
    return text.replace("\\", "\\\\").replace('"', '\\"')
