"""`EvaluatedAgents`: draws the images of validation, test and predict, without and with prompt enhancement."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import lightning as L
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from PIL.Image import Image

from datamodules.base import PredictBatch, PromptDataModule, PromptSample, bare
from datamodules.chunks import chunks
from lightning_modules.agents import Agents
from lightning_modules.groups import source_images
from lightning_modules.image_store import ImageStore
from lightning_modules.policies.flow import FlowPolicy, to_pil
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.seeding import seed_of

MODES = ("without_pe", "with_pe")
"""Ways to draw an evaluation prompt: as it is, or as the refiner's greedy rewrite (prompt enhancement, PE)."""


@dataclass(frozen=True)
class EvaluationBatch:
    """Images that an evaluation step drew for B prompts of one set, K of each prompt.

    Attributes:
        name: name of the set.
        samples: B original prompts.
        prompts: mode -> B prompts as drawn; those of "with_pe" are greedy rewrites.
        seeds: K lists of B seeds.
        images: mode -> K lists of B images.
    """

    name: str
    samples: Sequence[PromptSample]
    prompts: dict[str, list[str]]
    seeds: list[list[int]]
    images: dict[str, list[list[Image]]]


class EvaluatedAgents(Agents):
    """Agents that draw evaluation prompts; callbacks score what they draw.

    Args:
        flow: the image model.
        language: the refiner, or null.
        optimizer: gets one parameter group per learning agent.
        lr_scheduler: schedule of the learning rates, as for `Agents`.
        warmup_steps: optimizer steps of warm-up.
    """

    def __init__(
        self,
        flow: FlowPolicy,
        language: LanguagePolicy | None,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__(flow, language, optimizer, lr_scheduler, warmup_steps)
        self.images_per_evaluation: int | None = None
        """Number of images of each prompt in each mode in `lightning test` and `predict`.

        None is the data's, and 1 in predict. Validation draws one, or as many as its file lists the prompt.
        """
        self.image_store: ImageStore | None = None
        """Folder in which `lightning test` and `predict` keep images; set by a callback."""
        self.on_share_drawn: Callable[[float], None] | None = None
        """Called with the share of an evaluation's batch that is drawn, after every micro-batch; set by a callback."""
        self._drawn = self._to_draw = 0
        self._validated_step = -1
        self._validation_due = False

    def validation_step(  # type: ignore[override]
        self, batch: Sequence[PromptSample], batch_idx: int, dataloader_idx: int = 0
    ) -> EvaluationBatch:
        """Draws each prompt, once unless its file repeats it, without and, if there is a refiner, with PE."""
        name = self._data.eval_names[dataloader_idx]
        return self._draw_batch(name, batch, self._repeats(name))

    def test_step(  # type: ignore[override]
        self, batch: Sequence[PromptSample], batch_idx: int, dataloader_idx: int = 0
    ) -> EvaluationBatch:
        """Draws `images_per_evaluation` images of each prompt; the first has the noise of `validation_step`."""
        name = self._data.eval_names[dataloader_idx]
        num = self.images_per_evaluation or max(self._data.test_images_per_prompt, self._repeats(name))
        return self._draw_batch(name, batch, num)

    def predict_step(self, batch: PredictBatch, batch_idx: int) -> EvaluationBatch:
        """Draws `images_per_evaluation` images of each prompt, like `test_step`."""
        return self._draw_batch(batch.name, batch.samples, self.images_per_evaluation or 1)

    def modes(self, name: str) -> tuple[str, ...]:
        """Modes in which the prompts of a set are drawn."""
        unrefined = self._data.unrefined if self._trainer is not None else ()
        return MODES[:1] if self.language is None or name in unrefined else MODES

    def draw(
        self,
        name: str,
        mode: str,
        k: int,
        samples: Sequence[PromptSample],
        prompts: Sequence[str],
        seeds: Sequence[int],
    ) -> list[Image]:
        """Draws B images, or loads them from the image store if it has all of them; saves what it draws.

        A batch is drawn as a whole, since a batch of other prompts could round differently.

        Args:
            name: name of the set.
            mode: one of `MODES`, which the prompts are for.
            k: number of the image among those of its prompt.
            samples: B original prompts.
            prompts: B prompts to draw.
            seeds: B seeds.
        """
        if not samples:
            return []
        if self.image_store is not None:
            kept = self.image_store.load(name, mode, k, samples, prompts, seeds)
            if kept is not None:
                return kept
        light = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        steps = self.flow.sampling.val_steps if light else None
        pixels = self.flow.generate(prompts, seeds, steps, source_images(samples), on_sampled=self._count)
        wrong = [sample.id for sample, image in zip(samples, pixels, strict=True) if not image.isfinite().all()]
        if wrong:
            warnings.warn(
                f"{len(wrong)} of {len(samples)} images of {name} ({mode}) have pixels that are not finite, for "
                f"example that of the prompt {wrong[0]}, and are black there; use `dtype: bfloat16` or `float32`.",
                stacklevel=2,
            )
        images = to_pil(pixels)
        if self.image_store is not None:
            self.image_store.save(name, mode, k, samples, prompts, seeds, images)
        return images

    def _draw_batch(self, name: str, samples: Sequence[PromptSample], num: int) -> EvaluationBatch:
        prompts = {mode: self._prompts(name, mode, samples) for mode in self.modes(name)}
        seeds = [evaluation_seeds(samples, k) for k in range(num)]
        self._drawn, self._to_draw = 0, len(prompts) * num * len(samples)
        # Image by image, so that the first ones come from the same batch as in validation, to the last bit.
        images = {
            mode: [self.draw(name, mode, k, samples, texts, seeds[k]) for k in range(num)]
            for mode, texts in prompts.items()
        }
        self._to_draw = 0
        return EvaluationBatch(name, samples, prompts, seeds, images)

    def _count(self, num: int) -> None:
        self._drawn += num
        if self.on_share_drawn is not None and self._to_draw:
            self.on_share_drawn(self._drawn / self._to_draw)

    def _prompts(self, name: str, mode: str, samples: Sequence[PromptSample]) -> list[str]:
        """Returns the prompts to draw for B samples in a mode: saved rewrites first, else new ones."""
        if mode == "without_pe":
            return [sample.asked for sample in samples]
        if not samples:
            return []
        kept = None if self.image_store is None else self.image_store.saved_rewrites(name, mode, 0, samples)
        if kept is not None:
            return kept
        assert self.language is not None
        return self.language.rewrite(samples)

    def _repeats(self, name: str) -> int:
        """Returns the number of times that the file of a set lists each of its prompts, or the rarest of them.

        Other wordings are drawn as often as their originals, of which they may lack the rarest.
        """
        samples = self._data.eval_sets[self._data.originals.get(name, name)]
        return min((sample.repeats for sample in bare(samples)), default=1)

    @property
    def _data(self) -> PromptDataModule:
        data: PromptDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        return data

    def on_validation_end(self) -> None:
        """Records that the agents of this step have been evaluated."""
        super().on_validation_end()
        self._validated_step = self.global_step

    def on_validation_start(self) -> None:
        """Gathers sharded weights; warns of long prompts in `lightning validate`, as `on_train_start` does in a fit."""
        super().on_validation_start()
        if self.trainer.state.fn == TrainerFn.VALIDATING:
            warn_of_long_prompts(self.flow, self._data.eval_sets)

    def on_test_start(self) -> None:
        """Warns of long prompts."""
        warn_of_long_prompts(self.flow, self._data.eval_sets)

    def on_predict_start(self) -> None:
        """Warns of long prompts."""
        warn_of_long_prompts(self.flow, self._data.predict_samples())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes if the validation of the checkpoint's step was cut off."""
        super().on_load_checkpoint(checkpoint)
        self._validation_due = checkpoint.get("validation_due", False)

    def on_train_start(self) -> None:
        """Warns of long prompts, and evaluates the agents before training, in a resumed run only if that is due."""
        super().on_train_start()
        warn_of_long_prompts(self.flow, {"training": self._data.training_set} | self._data.eval_samples())
        if self.global_step == 0 or self._validation_due:
            validate_now(self.trainer)

    def on_train_end(self) -> None:
        """Evaluates the agents after training, unless that has just been done."""
        if self._validated_step != self.global_step:
            validate_now(self.trainer)


@rank_zero_only
def warn_of_long_prompts(flow: FlowPolicy, sets: Mapping[str, Sequence[PromptSample]]) -> None:
    """Warns once if the flow model's text encoders read only the beginning of some prompts.

    Args:
        flow: the image model; one that is not loaded reads nothing.
        sets: name of the set -> its prompts.
    """
    found = []
    for name, samples in sets.items() if flow.network is not None else ():
        samples = bare(samples)
        parts = [samples[rows] for rows in chunks(len(samples), 1000)]
        cut = [flow.cut([sample.asked for sample in part]) for part in parts]
        ids = [sample.id for sample, is_cut in zip(samples, chain(*cut), strict=True) if is_cut]
        if ids:
            found.append(f"{len(ids)} of {len(samples)} in {name} (such as id {ids[0]!r})")
    if found:
        rank_zero_warn(
            f"the text encoders of {flow.model} read only the beginning of long prompts: {', '.join(found)}; shorten "
            "them, or raise `flow.max_sequence_length`: what stands behind has no effect on the image."
        )


def validate_now(trainer: L.Trainer) -> None:
    """Runs the validation loop inside a fit; Lightning itself does so only between training batches.

    Nothing happens where validation is switched off (`limit_val_batches: 0`) or the data module has none.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.setup_data()
    if not trainer.enable_validation or not loop.max_batches:
        return
    trainer.validating = True
    loop.restarting = False  # a resumed run would skip what its checkpoint has counted
    loop.run()
    trainer.training = True


def evaluation_seeds(samples: Sequence[PromptSample], number: int = 0) -> list[int]:
    """Seeds of the evaluation noise, fixed by prompt id and image number (0 in validation)."""
    return [seed_of("evaluation", sample.id, *([number] if number else [])) for sample in samples]
