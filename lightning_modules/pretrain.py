"""Makes the miniature's base models with the same CLI: an autoencoder, a flow model, and a refiner.

`configs/miniature/pretrain_{vae,flow,language}.yaml`, run in this order, rebuild what `miniature/` ships.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from datamodules.shapes_world import vocabulary
from lightning_modules.miniature import TEXT_LENGTH, build_flow, build_language, build_vae
from lightning_modules.rl.schedule import dynamic_mu


class _Pretraining(L.LightningModule):
    """AdamW with a short warm-up and cosine decay; saves to `output` when training ends.

    Args:
        output: folder to write.
        learning_rate: peak learning rate.
        warmup_steps: length of the linear warm-up.
    """

    def __init__(self, output: str, learning_rate: float, warmup_steps: int = 100) -> None:
        super().__init__()
        self.output = Path(output)
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over the parameters that are to be learned."""
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], self.learning_rate)
        total = self.trainer.estimated_stepping_batches

        def factor(step: int) -> float:
            return min(1.0, (step + 1) / self.warmup_steps) * (0.5 + 0.5 * math.cos(math.pi * min(step / total, 1.0)))

        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "interval": "step"},
        }


class VAEPretraining(_Pretraining):
    """Trains the autoencoder on scenes (L1 + L2, a little KL) and sets its latents' scale and shift."""

    def __init__(
        self, output: str = "miniature/flow/vae", learning_rate: float = 3e-3, kl_weight: float = 1e-5
    ) -> None:
        super().__init__(output, learning_rate)
        self.kl_weight = kl_weight
        self.vae: Any

    def configure_model(self) -> None:
        """Builds the autoencoder."""
        if not hasattr(self, "vae"):
            self.vae = build_vae()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Reconstruction of `pictures` [B, 3, 32, 32] in [-1, 1]."""
        posterior = self.vae.encode(batch["pictures"]).latent_dist
        error = self.vae.decode(posterior.sample()).sample - batch["pictures"]
        loss = error.abs().mean() + error.pow(2).mean()
        self.log_dict({"train/l1": error.abs().mean(), "train/loss": loss}, prog_bar=True)
        return loss + self.kl_weight * posterior.kl().mean()

    @torch.no_grad()
    def on_train_end(self) -> None:
        """Makes latents zero-mean and unit-variance by the config's own fields, then saves."""
        batches = self.trainer.train_dataloader
        assert batches is not None
        stream = iter(batches)
        latents = torch.cat(
            [self.vae.encode(next(stream)["pictures"].to(self.device)).latent_dist.mode() for _ in range(16)]
        )
        self.vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
        self.vae.save_pretrained(self.output)


class FlowPretraining(_Pretraining):
    """Trains transformer and text encoders of a FLUX.1 pipeline by flow matching on captioned scenes.

    Args:
        output: pipeline folder to write; its `vae` must exist (pretrain_vae.yaml makes it).
        learning_rate: peak learning rate.
        guidance: value of the embedded guidance, the same in training and in use.
        init: continue from this pipeline folder instead of from random weights.
    """

    def __init__(
        self,
        output: str = "miniature/flow",
        learning_rate: float = 1.4e-3,
        guidance: float = 3.5,
        init: str | None = None,
    ) -> None:
        super().__init__(output, learning_rate, warmup_steps=200)
        self.guidance = guidance
        self.init = init
        self.pipe: Any

    def configure_model(self) -> None:
        """Builds or loads the pipeline around the trained autoencoder."""
        if hasattr(self, "pipe"):
            return
        if self.init is not None:
            self.pipe = FluxPipeline.from_pretrained(self.init)
        else:
            if not (self.output / "vae").is_dir():
                raise ValueError(f"no autoencoder in {self.output / 'vae'}: run pretrain_vae.yaml first")
            self.pipe = build_flow(vocabulary(), AutoencoderKL.from_pretrained(self.output / "vae"))
        self.vae = self.pipe.vae.requires_grad_(False).eval()
        self.learned = torch.nn.ModuleList([self.pipe.transformer, self.pipe.text_encoder, self.pipe.text_encoder_2])
        self.learned.requires_grad_(True).train()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Mean squared error of the velocity at sigmas spread like the sampler's grid."""
        pipe = self.pipe
        with torch.no_grad():
            latents = pipe.vae.encode(batch["pictures"]).latent_dist.mode()
            latents = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
            b, c, h, w = latents.shape
            latents = pipe._pack_latents(latents, b, c, h, w)
        # What `pipe.encode_prompt` does, without its second tokenization that only serves a warning.
        pooled = pipe.text_encoder(self._tokens(pipe.tokenizer, batch["captions"])).pooler_output
        embeds = pipe.text_encoder_2(self._tokens(pipe.tokenizer_2, batch["captions"]))[0]
        image_ids = pipe._prepare_latent_image_ids(b, h // 2, w // 2, self.device, embeds.dtype)
        shift = math.exp(dynamic_mu(latents.shape[1]))
        # Stratified: one sigma from each of B equal slices, which steadies the loss at no cost.
        uniform = (torch.randperm(b, device=self.device) + torch.rand(b, device=self.device)) / b
        sigma = shift * uniform / (1 + (shift - 1) * uniform)
        noise = torch.randn_like(latents)
        noisy = torch.lerp(latents, noise, sigma[:, None, None])
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
        loss = F.mse_loss(velocity, noise - latents)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def _tokens(self, tokenizer: Any, captions: list[str]) -> Tensor:
        padded = tokenizer(
            captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        ids: Tensor = padded.input_ids
        return ids.to(self.device)

    def on_train_end(self) -> None:
        """Saves the pipeline (averaged weights, if the averaging callback is on)."""
        self.pipe.save_pretrained(self.output)


class LanguagePretraining(_Pretraining):
    """Supervised fine-tuning of a small Qwen3 on prompt-rewrite pairs, through its own chat template."""

    def __init__(self, output: str = "miniature/language", learning_rate: float = 3e-3) -> None:
        super().__init__(output, learning_rate)

    def configure_model(self) -> None:
        """Builds the model and its tokenizer."""
        if hasattr(self, "model"):
            return
        self.model, self.tokenizer = build_language(vocabulary())
        self.model.train()

    def training_step(self, batch: dict[str, list[str]], batch_idx: int) -> Tensor:
        """Cross-entropy of the completion's tokens; the prompt's are only read."""
        chats = [[{"role": "user", "content": prompt}] for prompt in batch["prompts"]]
        heads = [self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        texts = [f"{head}{completion} <end>" for head, completion in zip(heads, batch["completions"], strict=True)]
        encoded = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(self.device)
        lengths = torch.tensor([len(ids) for ids in self.tokenizer(heads)["input_ids"]], device=self.device)
        columns = torch.arange(encoded["input_ids"].shape[1], device=self.device)
        labels = encoded["input_ids"].masked_fill((columns < lengths[:, None]) | (encoded["attention_mask"] == 0), -100)
        loss: Tensor = self.model(encoded["input_ids"], attention_mask=encoded["attention_mask"], labels=labels).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_train_end(self) -> None:
        """Saves model and tokenizer."""
        self.model.save_pretrained(self.output)
        self.tokenizer.save_pretrained(self.output)
