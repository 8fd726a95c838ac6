"""What both agents share with Lightning: loading, one optimizer, evaluation, and checkpoints of what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from PIL.Image import Image

from datamodules.base import PredictBatch, PromptSample
from lightning_modules.groups import source_images
from lightning_modules.policies.base import FlowPolicy, to_pil
from lightning_modules.policies.language import LanguagePolicy
from lightning_modules.rollout import seed_of
from lightning_modules.validation import validate_now


@dataclass(frozen=True)
class Predictions:
    """What `predict_step` draws for B prompts of one set, K pictures each.

    Attributes:
        name: of the set.
        samples: B original prompts.
        rewrites: B greedy rewrites, or None without a refiner.
        seeds: K lists of B seeds.
        images: mode ("without_pe" or "with_pe") -> K lists of B pictures.
    """

    name: str
    samples: Sequence[PromptSample]
    rewrites: list[str] | None
    seeds: list[list[int]]
    images: dict[str, list[list[Image]]]


class Agents(L.LightningModule):
    """A flow model and perhaps a refiner, of which at least one learns.

    Args:
        flow: the image model.
        language: the refiner, or null.
        optimizer: gets one parameter group per learning agent.
    """

    def __init__(self, flow: FlowPolicy, language: LanguagePolicy | None, optimizer: OptimizerCallable) -> None:
        super().__init__()
        if not flow.trained and (language is None or not language.trained):
            raise ValueError("nothing learns: set a learning_rate for `model.flow` or for `model.language`.")
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints hold what is trained; on_load_checkpoint compares the names
        self.flow = flow
        self.language = language
        self.optimizer = optimizer
        self.num_rollouts = 0
        """Images drawn for training so far, over all ranks."""
        self.images_per_prediction = 1
        """Pictures that `predict_step` draws of each prompt in each mode."""
        self._validated_step = -1

    # --- set-up ---------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Loads both agents."""
        self.flow.load()
        if self.flow.trained and not self.flow.sampling.sde_steps:
            raise ValueError(
                "`flow.sampling.sde_steps` is empty, so the flow model has nothing to learn from; add some."
            )
        if self.language is not None:
            self.language.load()

    def on_fit_start(self) -> None:
        """Refuses precisions that would train wrongly in silence."""
        check_precision(self.trainer.precision)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One optimizer with a parameter group per learning agent, so that one RL step is one `global_step`."""
        return self.optimizer([agent.parameter_group() for agent in self._learners()])

    def _learners(self) -> list[FlowPolicy | LanguagePolicy]:
        agents = [self.flow, self.language]
        return [agent for agent in agents if agent is not None and agent.trained]

    # --- evaluation -------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Sequence[PromptSample], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Draws every prompt without and, if there is a refiner, with prompt enhancement; callbacks do the scoring."""
        wordings = self._wordings(batch)
        images = {mode: self._draw(batch, prompts, _seeds(batch)) for mode, prompts in wordings.items()}
        return {"samples": batch, "images": images, "rewrites": wordings.get("with_pe")}

    test_step = validation_step

    def predict_step(self, batch: PredictBatch, batch_idx: int) -> Predictions:
        """Draws every prompt as `validation_step` does, and again with other noise for further pictures."""
        wordings = self._wordings(batch.samples)
        seeds = [_seeds(batch.samples, number) for number in range(self.images_per_prediction)]
        # Picture by picture, so that the first ones come from the same batch as in validation, to the last bit.
        images = {mode: [self._draw(batch.samples, prompts, s) for s in seeds] for mode, prompts in wordings.items()}
        return Predictions(batch.name, batch.samples, wordings.get("with_pe"), seeds, images)

    def _wordings(self, samples: Sequence[PromptSample]) -> dict[str, list[str]]:
        """The prompts to draw in each mode."""
        wordings = {"without_pe": [sample.prompt for sample in samples]}
        if self.language is not None:
            wordings["with_pe"] = self.language.rewrite(samples)
        return wordings

    def _draw(self, samples: Sequence[PromptSample], prompts: list[str], seeds: list[int]) -> list[Image]:
        return to_pil(self.flow.generate(prompts, seeds, images=source_images(samples)))

    def on_validation_end(self) -> None:
        """Notes that this step's agents have been evaluated."""
        self._validated_step = self.global_step

    def on_train_start(self) -> None:
        """Evaluates the agents before training, unless the run is resumed."""
        if self.global_step == 0:
            validate_now(self.trainer)

    def on_train_end(self) -> None:
        """Evaluates the agents after training, unless that has just been done."""
        if self._validated_step != self.global_step:
            validate_now(self.trainer)

    # --- checkpoints: what is trained, and nothing else ---------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps trained weights only, and the count of rollouts."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["num_rollouts"] = self.num_rollouts

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of other agents: loading is not strict, so missing names would pass in silence."""
        self.num_rollouts = checkpoint.get("num_rollouts", 0)
        if self.flow.network is None:
            return
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        wrong = trained.symmetric_difference(checkpoint["state_dict"])
        if wrong:
            raise ValueError(
                f"the checkpoint does not fit this configuration: {len(wrong)} trained weights differ, for example "
                f"{min(wrong)}; use the agents, LoRA settings and learning rates that it was trained with."
            )


def check_precision(precision: str | int) -> None:
    """Raises a ValueError for precisions other than fp32 and bf16-mixed.

    fp16 scales its losses, and clipping would see scaled gradients; the "true" ones convert inputs, which are prompts.
    """
    if str(precision) not in ("32-true", "32", "bf16-mixed", "bf16"):
        raise ValueError(
            f"`trainer.precision` is {precision}, which PromptRL does not train in; use bf16-mixed, or 32-true with "
            "the agents' own `dtype`."
        )


def _seeds(samples: Sequence[PromptSample], number: int = 0) -> list[int]:
    """Of evaluation noise: a function of the prompt's id and of the picture's number, 0 being validation's."""
    return [seed_of("evaluation", sample.id, *([number] if number else [])) for sample in samples]
