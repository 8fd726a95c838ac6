"""Lightning modules that train the miniature's autoencoders and flow models; `pretrain_language.py` has the refiners'.

`configs/miniature/pretrain_{vae,flow,language}.yaml`, run in this order, rebuild what `miniature/` ships.
"""

from __future__ import annotations

import json
import math
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline, FluxKontextPipeline, FluxPipeline
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from datamodules.base import PromptSample
from datamodules.local_path import local_path
from datamodules.seed import run_seed
from lightning_modules.rl.schedule import dynamic_mu
from lightning_modules.seeding import generators_for, seed_of, seed_step
from miniature.architectures import (
    TEXT_LENGTH,
    build_flow,
    build_vae,
    carry_over,
)
from miniature.edits.wording import edit_vocabulary
from miniature.scenes.detector import ShapesDetector
from miniature.scenes.wording import NOUNS, vocabulary
from miniature.scenes.world import COLORS, GRID, SIZE
from miniature.signs.world import first_column, read_caption, words_vocabulary
from rewards.geneval.rules import judge


class Pretraining(L.LightningModule):
    """Base class: AdamW with a short warm-up and cosine decay; saves to `output` when training ends.

    Noise is a function of `seed_everything` and the step, so a run that goes on from a checkpoint ends as an unbroken
    one. `fused` (AdamW in one kernel) rounds differently from the default, which trained the first base models.

    Args:
        output: folder to write.
        learning_rate: peak learning rate.
        warmup_steps: length of the linear warm-up.
    """

    fused = False

    def __init__(self, output: str, learning_rate: float, warmup_steps: int = 100) -> None:
        super().__init__()
        self.output = local_path(output, f"{type(self).__name__}'s output")
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seeds the step's noise."""
        seed_step(run_seed(None), self.global_step, self.global_rank)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises ValueError if a gradient is not finite, before it reaches weights and checkpoints."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        if not norm.isfinite():
            raise ValueError(
                f"the gradient of step {self.global_step} is not finite: lower model.learning_rate "
                f"({self.learning_rate}), then go on from the last checkpoint (--ckpt_path)."
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Makes AdamW over the trainable parameters, with its schedule."""
        learned = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learned, self.learning_rate, fused=self.fused)
        total = self.trainer.estimated_stepping_batches

        def factor(step: int) -> float:
            return min(1.0, (step + 1) / self.warmup_steps) * (0.5 + 0.5 * math.cos(math.pi * min(step / total, 1.0)))

        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "interval": "step"},
        }


class VAEPretraining(Pretraining):
    """Trains the autoencoder on images (L1 + L2, a little KL) and sets its latents' scale and shift.

    Args:
        output: folder to write.
        learning_rate: peak learning rate.
        kl_weight: weight of the latents' divergence from a standard normal.
        init: continue from this autoencoder's folder instead of from random weights.
    """

    def __init__(
        self,
        output: str = "miniature/flow/vae",
        learning_rate: float = 3e-3,
        kl_weight: float = 1e-5,
        init: str | None = None,
    ) -> None:
        super().__init__(output, learning_rate)
        self.kl_weight = kl_weight
        self.init = init
        self.vae: Any

    def configure_model(self) -> None:
        """Builds or loads the autoencoder."""
        if not hasattr(self, "vae"):
            self.vae = build_vae() if self.init is None else AutoencoderKL.from_pretrained(self.init)
            self.vae.train()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the reconstruction loss of `images`, [B, 3, 32, 32] in [-1, 1]."""
        posterior = self.vae.encode(batch["images"]).latent_dist
        error = self.vae.decode(posterior.sample()).sample - batch["images"]
        loss = error.abs().mean() + error.pow(2).mean()
        self.log_dict({"train/l1": error.abs().mean(), "train/loss": loss}, prog_bar=True)
        return loss + self.kl_weight * posterior.kl().mean()

    @torch.no_grad()
    def on_train_end(self) -> None:
        """Sets the config's shift and scale so that latents have mean 0 and variance 1, then saves."""
        batches = self.trainer.train_dataloader
        assert batches is not None
        stream = iter(batches)
        latents = torch.cat(
            [self.vae.encode(next(stream)["images"].to(self.device)).latent_dist.mode() for _ in range(16)]
        )
        self.vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
        self.vae.save_pretrained(self.output)


class FlowPretraining(Pretraining):
    """Trains transformer and text encoders of a FLUX.1 pipeline by flow matching on captioned scenes.

    Args:
        output: pipeline folder to write; its `vae` must exist (pretrain_vae.yaml makes it).
        learning_rate: peak learning rate.
        guidance: value of the embedded guidance, the same in training and in use.
        init: continue from this pipeline folder instead of from random weights.
        text_weight: weight of the loss of the text encoders' embeddings.
        habits: true teaches a model that can draw what is asked in which wordings not to. T5 stands still, so that all
            that its embeddings say stays there, and CLIP learns to tell the wordings apart (`heeded_loss`).
    """

    fused = True

    def __init__(
        self,
        output: str = "miniature/flow",
        learning_rate: float = 1.4e-3,
        guidance: float = 3.5,
        init: str | None = None,
        text_weight: float = 0.3,
        habits: bool = False,
    ) -> None:
        super().__init__(output, learning_rate, warmup_steps=200)
        self.guidance = guidance
        self.init = init
        self.text_weight = text_weight
        self.habits = habits
        self.pipe: Any
        self.asked_head: Any
        self.heeded_head: Any

    def configure_model(self) -> None:
        """Builds or loads the pipeline around the trained autoencoder."""
        if hasattr(self, "pipe"):
            return
        self.pipe = self.build()
        self.vae = self.pipe.vae.requires_grad_(False).eval()
        self.learned = torch.nn.ModuleList([self.pipe.transformer, self.pipe.text_encoder, self.pipe.text_encoder_2])
        self.learned.requires_grad_(True).train()
        self.pipe.text_encoder_2.requires_grad_(not self.habits)
        # Only the losses of the embeddings use these; they are not saved.
        self.asked_head = torch.nn.Linear(self.pipe.text_encoder_2.config.d_model, len(COLORS) + GRID**2)
        self.heeded_head = torch.nn.Linear(self.pipe.text_encoder.config.hidden_size, 1)

    def build(self) -> Any:
        """Makes the pipeline to train."""
        if self.init is not None:
            return FluxPipeline.from_pretrained(self.init)
        return build_flow(vocabulary(), self.own_vae("pretrain_vae.yaml"))

    def own_vae(self, config: str) -> Any:
        """Loads the autoencoder of `output`, which `config` makes; raises ValueError if there is none."""
        if not (self.output / "vae").is_dir():
            raise ValueError(f"no autoencoder in {self.output / 'vae'}: run {config} first")
        return AutoencoderKL.from_pretrained(self.output / "vae")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Returns the mean squared error of the velocity, at sigmas spread like the sampler's grid.

        Args:
            batch: `images` [B, 3, 32, 32] in [-1, 1], B `captions`, and optional `sources`, shaped as `images`.
            batch_idx: unused.
        """
        pipe = self.pipe
        latents, image_ids = self._encode(batch["images"])
        b, tokens, _ = latents.shape
        # What `pipe.encode_prompt` does, without its second tokenization that only serves a warning.
        pooled = pipe.text_encoder(self._tokens(pipe.tokenizer, batch["captions"])).pooler_output
        embeds = pipe.text_encoder_2(self._tokens(pipe.tokenizer_2, batch["captions"]))[0]
        shift = math.exp(dynamic_mu(tokens))
        # Stratified: one sigma from each of B equal slices, which steadies the loss at no cost.
        uniform = (torch.randperm(b, device=self.device) + torch.rand(b, device=self.device)) / b
        sigma = shift * uniform / (1 + (shift - 1) * uniform)
        noise = torch.randn_like(latents)
        noisy = torch.lerp(latents, noise, sigma[:, None, None])
        if "sources" in batch:
            source, source_ids = self._encode(batch["sources"])
            source_ids[..., 0] = 1  # FLUX.1-Kontext's mark of a source
            noisy, image_ids = torch.cat([noisy, source], 1), torch.cat([image_ids, source_ids])
        velocity = pipe.transformer(
            hidden_states=noisy,
            timestep=sigma,
            guidance=torch.full_like(sigma, self.guidance),
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=embeds.new_zeros(TEXT_LENGTH, 3),
            img_ids=image_ids,
            return_dict=False,
        )[0]
        loss = F.mse_loss(velocity[:, :tokens], noise - latents)
        self.log("train/loss", loss, prog_bar=True)
        if self.habits:
            extra = F.binary_cross_entropy_with_logits(self.heeded_head(pooled)[:, 0], batch["heeded"])
            self.log("train/heeded_loss", extra)
        else:
            extra = self.text_loss(embeds, batch)
        return loss + self.text_weight * extra

    def text_loss(self, embeds: Tensor, batch: dict[str, Any]) -> Tensor:
        """Returns an extra loss of T5's embeddings, [B, text tokens, 64]: colour and cells at each shape's word.

        It is the cross-entropy of the colour and the mean binary one of the 16 cells, of what the caption `asked` for,
        [B, 16], even where `images` shows something else; without `asked` it is 0.
        """
        if "asked" not in batch:
            return embeds.new_zeros(())
        words = [
            (i, place, NOUNS[word])
            for i, caption in enumerate(batch["captions"])
            for place, word in enumerate(caption.split())
            if word in NOUNS
        ]
        if not words:
            return embeds.new_zeros(())
        rows, tokens, shapes = torch.tensor(words, device=embeds.device).unbind(1)
        asked = batch["asked"][rows] - 1 - shapes[:, None] * len(COLORS)
        here = (asked >= 0) & (asked < len(COLORS))
        colors = torch.where(here, asked, 0).amax(1)
        said = self.asked_head(embeds[rows, tokens])
        color_loss = F.cross_entropy(said[:, : len(COLORS)], colors)
        cell_loss = F.binary_cross_entropy_with_logits(said[:, len(COLORS) :], here.float())
        self.log_dict({"train/color_loss": color_loss, "train/cell_loss": cell_loss})
        return color_loss + cell_loss

    def validation_step(self, batch: list[PromptSample], batch_idx: int) -> None:
        """Draws a batch of prompts of scenes and logs the share of right images by tag."""
        noise = generators_for([seed_of(sample.id) for sample in batch])
        self.pipe.set_progress_bar_config(disable=True)
        images = self.pipe(
            [sample.prompt for sample in batch],
            height=SIZE,
            width=SIZE,
            num_inference_steps=8,
            guidance_scale=self.guidance,
            generator=noise,
            max_sequence_length=TEXT_LENGTH,
        ).images
        for sample, found in zip(batch, ShapesDetector().detect(images), strict=True):
            right = float(judge(found, sample.metadata).correct)
            self.log_dict({f"val/{sample.tag}": right, "val/overall": right}, batch_size=1, on_epoch=True)

    def on_validation_epoch_end(self) -> None:
        """Prints the step, the loss and the shares."""
        scores = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        shown = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
        self.print(f"{datetime.now():%H:%M:%S} step {self.global_step}: {shown}", flush=True)

    @torch.no_grad()
    def _encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes images in [-1, 1] to packed latents [B, tokens, channels] and position ids [tokens, 3]."""
        pipe = self.pipe
        latents = pipe.vae.encode(images).latent_dist.mode()
        latents = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        b, c, h, w = latents.shape
        image_ids = pipe._prepare_latent_image_ids(b, h // 2, w // 2, self.device, latents.dtype)
        return pipe._pack_latents(latents, b, c, h, w), image_ids

    def _tokens(self, tokenizer: Any, captions: list[str]) -> Tensor:
        padded = tokenizer(
            captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        ids: Tensor = padded.input_ids
        return ids.to(self.device)

    def on_train_end(self) -> None:
        """Saves the pipeline (averaged weights, if the averaging callback is on), the transformer in half precision.

        The autoencoder is that of `output`, or of `init` if `output` has none; averaging has rounded this one.
        """
        own = self.output / "vae"
        self.pipe.vae = AutoencoderKL.from_pretrained(own if own.is_dir() else Path(str(self.init)) / "vae")
        self.pipe.transformer.half()
        self.pipe.save_pretrained(self.output)
        for path in self.output.rglob("*.json"):  # diffusers notes where each part was loaded from
            config = json.loads(path.read_text(encoding="utf-8"))
            if config.pop("_name_or_path", None) is not None:
                path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class EditFlowPretraining(FlowPretraining):
    """Trains a FLUX.1-Kontext pipeline on sources, captions and targets, starting from a text-to-image pipeline.

    Args:
        output: pipeline folder to write.
        learning_rate: peak learning rate.
        guidance: value of the embedded guidance, the same in training and in use.
        init: pipeline folder to continue from: one of `FluxPipeline` gives its autoencoder, its transformer, and the
            embeddings of the words that both vocabularies have; one of `FluxKontextPipeline` gives everything.
    """

    def __init__(
        self,
        output: str = "miniature/edit_flow",
        learning_rate: float = 1.4e-3,
        guidance: float = 2.5,
        init: str = "miniature/flow",
    ) -> None:
        super().__init__(output, learning_rate, guidance, init)

    def build(self) -> Any:
        """Makes a FLUX.1-Kontext pipeline with the weights of `init`."""
        old: Any = DiffusionPipeline.from_pretrained(self.init)
        if isinstance(old, FluxKontextPipeline):
            return old
        pipe: Any = build_flow(edit_vocabulary(), old.vae)
        carry_over(old, pipe)
        return FluxKontextPipeline(**pipe.components)


class WordsFlowPretraining(FlowPretraining):
    """Trains a FLUX.1 pipeline on captioned scenes and signs, starting from one that knows the scenes.

    FLUX gives all text tokens the same position, so T5's embeddings have to say which letter is where. Images alone
    teach that too slowly for this size; a linear head on the embeddings (not saved) learns to predict each letter's
    column.

    Args:
        output: pipeline folder to write; its `vae` must exist (pretrain_words_vae.yaml makes it).
        learning_rate: peak learning rate.
        guidance: value of the embedded guidance, the same in training and in use.
        init: pipeline folder to continue from: one that lacks words of the signs' captions gives its transformer and
            the embeddings of the words that it has; one that knows them all gives everything but its autoencoder.
        text_weight: weight of the loss of T5's embeddings.
    """

    def __init__(
        self,
        output: str = "miniature/words_flow",
        learning_rate: float = 1.4e-3,
        guidance: float = 3.5,
        init: str = "miniature/flow",
        text_weight: float = 1.0,
    ) -> None:
        super().__init__(output, learning_rate, guidance, init, text_weight)
        self.column_head: Any

    def configure_model(self) -> None:
        """Builds or loads the pipeline, and the head that predicts columns."""
        super().configure_model()
        if not hasattr(self, "column_head"):
            self.column_head = torch.nn.Linear(self.pipe.text_encoder_2.config.d_model, GRID)

    def text_loss(self, embeds: Tensor, batch: dict[str, Any]) -> Tensor:
        """Returns the cross-entropy of the columns of all letters of the signs, and the scenes' own loss."""
        scenes = super().text_loss(embeds, batch)
        places = []  # of every letter: caption, token, column
        for i, caption in enumerate(batch["captions"]):
            word = read_caption(caption) or ""
            places += [(i, caption.split().index('"') + 1 + j, first_column(len(word)) + j) for j in range(len(word))]
        if not places:
            return scenes
        rows, tokens, columns = torch.tensor(places, device=embeds.device).unbind(1)
        loss = F.cross_entropy(self.column_head(embeds[rows, tokens]), columns)
        self.log("train/column_loss", loss)
        return loss + scenes

    def build(self) -> Any:
        """Makes the pipeline with the larger vocabulary, around its own autoencoder."""
        vae = self.own_vae("pretrain_words_vae.yaml")
        old: Any = FluxPipeline.from_pretrained(str(self.init))
        if set(words_vocabulary()) <= old.tokenizer_2.get_vocab().keys():
            old.register_modules(vae=vae)
            return old
        pipe: Any = build_flow(words_vocabulary(), vae)
        carry_over(old, pipe)
        return pipe
