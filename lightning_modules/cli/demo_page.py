"""The page of `promptrl demo`: a prompt as it is and rewritten, before and after training, from the same noise."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import gradio as gr
import lightning as L
from torch import Tensor

from datamodules.base import PromptDataModule, PromptSample
from datamodules.lazy import spread
from datamodules.typed import TypedPrompts
from lightning_modules.cli.command import PromptRLCLI
from lightning_modules.cli.errors import complain, raised_by_us
from lightning_modules.cli.run import run
from lightning_modules.evaluation import MODES, EvaluatedAgents, EvaluationBatch
from lightning_modules.policies.pipeline import PipelinePolicy
from lightning_modules.run_folder import RunFolder

STAGES = ("Before training", "After training")
_LABELS = {"without_pe": "as written", "with_pe": "rewritten"}
_NUM_EXAMPLES = 5
_HEAD = """
# A prompt before and after training
Every image of a prompt starts from the same noise. Noise 0 is that of `promptrl predict --prompt`; other numbers give
other images.
"""
_SMALL = 200
"""Pixels of an image below which it is shown as squares: enlarged smoothly it would be a blur."""
_FONTS = ["system-ui", "sans-serif"]
_CSS = """
@media (min-width: 2560px) { .gradio-container { zoom: 1.6; } }
.drawn { aspect-ratio: 1; }
.source { height: 240px; }
.drawn img, .source img { width: 100%; height: 100%; object-fit: contain; }
.small img { image-rendering: pixelated; }
.fault * { color: #b00020; }
"""


class Drawn(L.Callback):
    """Holds what was drawn: Lightning itself cannot return a frozen record."""

    batch: EvaluationBatch

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *batch: Any, **more: Any
    ) -> None:
        """Holds the last batch."""
        self.batch = outputs


class DrawingCLI(PromptRLCLI):
    """`lightning predict` that draws nothing yet: it loads a run's agents, which then draw whatever is typed."""

    examples: Sequence[PromptSample] = ()
    """Evaluation prompts of the run."""
    weights: Mapping[str, Mapping[str, Tensor]]
    """Trained weights at each stage, on the CPU."""

    def before_predict(self) -> None:
        """Takes examples from the run's data, which may be gone, and the weights before the checkpoint's are loaded."""
        super().before_predict()
        try:
            self.datamodule.setup("validate")
            samples = next(iter(cast(PromptDataModule, self.datamodule).eval_samples().values()))
            self.examples = [samples[row] for row in spread(len(samples), _NUM_EXAMPLES)]
        except ValueError as error:
            print(f"No examples on the page: {error}")
        self.datamodule = TypedPrompts([])
        self.model.configure_model()
        self.weights = {STAGES[0]: self._trained()}
        self._drawn = Drawn()
        self.trainer.callbacks.append(self._drawn)  # type: ignore[attr-defined]

    def after_predict(self) -> None:
        """Takes the checkpoint's weights."""
        self.weights = {**self.weights, STAGES[1]: self._trained()}

    def _trained(self) -> dict[str, Tensor]:
        named = self.model.named_parameters()
        return {name: weight.detach().to("cpu", copy=True) for name, weight in named if weight.requires_grad}

    @property
    def agents(self) -> EvaluatedAgents:
        """The run's agents."""
        return cast(EvaluatedAgents, self.model)

    @property
    def edits(self) -> bool:
        """True if the flow model starts from a source image."""
        return isinstance(self.agents.flow, PipelinePolicy) and self.agents.flow.edits

    def draw(self, stage: str, data: TypedPrompts) -> EvaluationBatch:
        """Draws a typed prompt as `lightning predict` does."""
        self.model.load_state_dict(self.weights[stage], strict=False)
        self.trainer.predict(self.model, data, return_predictions=False)
        return self._drawn.batch


def serve(
    runs: Sequence[RunFolder], commands: Sequence[Sequence[str]], host: str, port: int | None, share: bool
) -> None:
    """Loads runs and serves their page until Ctrl-C.

    Args:
        runs: folders of fits.
        commands: of each run, the words of the `lightning predict` that loads it.
        host: address to listen at.
        port: port to listen at; None is the first free one from 7860 on.
        share: also open a public link.
    """
    loaded = [cast(DrawingCLI, run(command, DrawingCLI)) for command in commands]
    page = build([f"### {folder.folder} ({folder.mode})" for folder in runs], loaded)
    try:
        page.launch(
            server_name=host, server_port=port, share=share, ssr_mode=False, quiet=True, prevent_thread_lock=True,
            css=_CSS, theme=gr.themes.Default(font=_FONTS, font_mono=["monospace"]), footer_links=[],
        )  # fmt: skip
    except OSError as error:
        sys.exit(complain(f"the page cannot be served at {host}: {error}"))
    print(f"Demo: {page.share_url or page.local_url}   (Ctrl-C ends it)", flush=True)
    page.block_thread()


def build(titles: Sequence[str], loaded: Sequence[DrawingCLI]) -> gr.Blocks:
    """Makes the page of loaded runs, each under its title."""
    with gr.Blocks(title="PromptRL demo", analytics_enabled=False) as page:
        gr.Markdown(_HEAD)
        with gr.Row(equal_height=True):
            prompt = gr.Textbox(label="Prompt", max_lines=8, autofocus=True, scale=6, min_width=280)
            noise = gr.Number(0, label="Noise", precision=0, minimum=0, scale=1, min_width=90)
            button = gr.Button("Draw", variant="primary", scale=1, min_width=90)
        fault = gr.Markdown(elem_classes="fault")
        fields: list[Any] = [prompt, noise]
        if any(one.edits for one in loaded):
            kept: dict[str, Any] = {"type": "filepath", "format": "png", "image_mode": None}
            source = gr.Image(sources=["upload", "clipboard"], label="Image to edit", elem_classes="source", **kept)
            fields.append(source)
        shown = [prompt, *fields[2:]]
        examples = {sample.content: [sample.asked, sample.image][: len(shown)] for sample in loaded[0].examples}
        if examples:
            gr.Examples([*examples.values()], shown, label="Evaluation prompts of the run", cache_examples=False)
        cells = [_cells(title, one) for title, one in zip(titles, loaded, strict=True)]
        outputs = [fault, *(part for parts in cells for cell in parts.values() for part in cell)]

        def draw(prompt: str, noise: int | None, image: str | None = None) -> Iterator[dict[Any, Any]]:
            yield dict.fromkeys(outputs)
            try:
                for one, parts in zip(loaded, cells, strict=True):
                    data = _typed(one, prompt, noise or 0, image)
                    for stage in STAGES:
                        drawn = one.draw(stage, data)
                        for mode, images in drawn.images.items():
                            yield dict(zip(parts[stage, mode], (images[0][0], drawn.prompts[mode][0]), strict=False))
            except ValueError as error:
                if raised_by_us(error) is None:
                    raise
                yield {fault: str(error)}

        gr.on([button.click, prompt.submit], draw, fields, outputs, api_visibility="private")
    return page


def _cells(title: str, one: DrawingCLI) -> dict[tuple[str, str], tuple[Any, ...]]:
    """Lays out a run; returns the image of each stage and mode, and of rewrites their text too."""
    gr.Markdown(title)
    if one.agents.language is None:
        gr.Markdown("This run has no refiner (flow-only RL): it draws prompts as they are written.")
    cells: dict[tuple[str, str], tuple[Any, ...]] = {}
    with gr.Row():
        for stage in STAGES:
            for mode in one.agents.modes("prompts"):
                with gr.Column(min_width=150):
                    gr.Markdown(f"{stage}, {_LABELS[mode]}")  # a label of the image would lie upon it
                    classes = ["drawn", "small"] if one.agents.flow.height < _SMALL else ["drawn"]
                    look: dict[str, Any] = {"interactive": False, "show_label": False, "buttons": []}
                    cells[stage, mode] = (gr.Image(format="png", elem_classes=classes, **look),)
                    if mode != MODES[0]:
                        cells[stage, mode] += (gr.Textbox(label="Rewrite", interactive=False, max_lines=8),)
    return cells


def _typed(one: DrawingCLI, prompt: str, noise: int, image: str | None) -> TypedPrompts:
    """Takes what was typed; raises ValueError for what cannot be drawn."""
    if not prompt.strip():
        raise ValueError("The prompt is empty: type what to draw, or take one of the examples.")
    if one.edits and image is None:
        raise ValueError("This run edits images: give it one, and as the prompt what to change in it.")
    return TypedPrompts([prompt], [image] if one.edits and image else [], first=noise)
