"""`FlowPolicy`: base class of all flow-matching models (sampling, log-prob replay, decoding)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from datamodules.chunks import chunks
from lightning_modules.policies.base import Policy
from lightning_modules.rl.sampling import SampledPath, Velocity, sample, sde_transition
from lightning_modules.rl.schedule import Window, sde_step_indices
from lightning_modules.rl.sde import SDEType, Transition, euler, sde_by_name
from lightning_modules.rollout import Conditioning, Trajectory
from lightning_modules.seeding import generators_for
from rewards.arguments import check_minimum


@dataclass(frozen=True)
class Sampling:
    """Settings of the sampler; the clip range is among them since it goes with the type of SDE.

    Args:
        num_steps: sampler steps.
        sde_steps: K for the first K steps, a list of steps, or a window; the others are Euler steps.
        sde_type: name of a step function in `lightning_modules/rl/sde.py`.
        noise_level: noise of the SDE steps; from 0 to 1 with cps.
        clip_range: the flow policy's ratio is clipped to 1 - clip_range, 1 + clip_range.
        eval_steps: sampler steps in evaluation (no noise is added there); null is `num_steps`.
        val_steps: sampler steps in validations within a fit, which may be lighter than tests; null is `eval_steps`.
        solver: how a rollout takes the steps without noise: by `euler` steps, as stock pipelines and evaluations do, or
            `multistep`, of second order with as many network calls (two-step Adams-Bashforth).
        share_start: samples of a group that have one prompt start from the same noise, and share the Euler steps before
            the first SDE step, which then cost one sample's network calls (branches as in TempFlow-GRPO, arXiv
            2508.04324). Their images differ by the noise of the SDE steps alone, so that a group compares fewer
            compositions.
    """

    num_steps: int = 20
    sde_steps: int | list[int] | Window = 20
    sde_type: SDEType = "flow_sde"
    noise_level: float = 0.8
    clip_range: float = 1e-4
    eval_steps: int | None = None
    val_steps: int | None = None
    solver: Literal["euler", "multistep"] = "euler"
    share_start: bool = False

    def __post_init__(self) -> None:
        own = "model.flow.sampling"
        check_minimum(own, 1, num_steps=self.num_steps, eval_steps=self.eval_steps, val_steps=self.val_steps)
        check_minimum(own, 0, noise_level=self.noise_level, clip_range=self.clip_range)
        if self.sde_type == "cps" and self.noise_level > 1:
            raise ValueError(
                f"{own} has noise_level={self.noise_level}, use at most 1 with sde_type cps: a quarter turn."
            )
        # Checks the steps now rather than at the first rollout.
        steps = sde_step_indices(self.sde_steps, self.num_steps, generator=torch.Generator())
        if self.share_start and (not steps or steps[0] == 0) and not isinstance(self.sde_steps, Window):
            raise ValueError(
                f"{own} has share_start, but `sde_steps` is {self.sde_steps}: give it SDE steps without step 0, or "
                "there are no Euler steps to share."
            )
        if self.share_start and self.solver != "euler":
            raise ValueError(
                f"{own} has share_start and solver: {self.solver}; the shared steps are Euler steps: use euler."
            )
        last = isinstance(self.sde_steps, Window) and (self.sde_steps.stop or self.num_steps) == self.num_steps
        if self.sde_type == "cps" and (last or self.num_steps - 1 in steps):
            raise ValueError(
                f"`sde_steps` is {self.sde_steps}, but the last of {self.num_steps} steps has no noise with "
                "sde_type cps; leave it out."
            )


class FlowPolicy(Policy):
    """A rectified-flow image model as a policy.

    Subclasses implement `load`, `sigmas`, `encode`, `latent_shape`, `velocity` and `decode`.

    Args:
        model: pipeline folder or hub id, or a LoRA's folder that names its pipeline.
        sampling: settings of the sampler.
        height: images' height in pixels.
        width: images' width in pixels.
        learning_rate: null freezes the flow model (prompt-only RL).
        weight_decay: AdamW's weight decay.
        kl_weight: weight of the Gaussian KL per step to the model before training; 0 keeps no reference.
        kl_units: the KL that `kl_weight` weighs: of a whole `step`, whose variance is s^2 |dt|, as the paper's code has
            it; or `flow_grpo`, where Flow-GRPO's code divides by s^2 alone: |dt| times as much (with cps the same); or
            `velocity`, the mean squared difference of velocities, which needs no SDE step.
        max_log_ratio: a run stops where replayed log-probs of SDE steps differ from sampled ones by more, in nats.
        **kwargs: as for `Policy`.
    """

    agent = "flow"

    def __init__(
        self,
        model: str,
        sampling: Sampling,
        height: int = 512,
        width: int = 512,
        learning_rate: float | None = 3e-7,
        weight_decay: float = 1e-4,
        kl_weight: float = 0.0,
        kl_units: Literal["step", "flow_grpo", "velocity"] = "step",
        max_log_ratio: float = 1e-5,
        **kwargs: Any,
    ) -> None:
        clip_range = sampling.clip_range
        super().__init__(model, learning_rate, weight_decay, kl_weight, clip_range, max_log_ratio, **kwargs)
        check_minimum("model.flow", 1, height=height, width=width)
        self.kl_units = kl_units
        self.sampling = sampling
        self.height = height
        self.width = width

    @abstractmethod
    def sigmas(self, num_steps: int) -> Tensor:
        """Returns the family's sigma table: [num_steps + 1] fp32 noise shares, falling from 1 to 0."""

    @abstractmethod
    def encode(self, prompts: Sequence[str], images: Sequence[Image.Image] | None = None) -> Conditioning:
        """Encodes B prompts (and B source images), every distinct one once."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one sample's latents as `velocity` takes them."""

    @abstractmethod
    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the velocity (noise minus image), [B, ...] fp32; rollout and replay both come through here.

        Args:
            latents: [B, ...] fp32.
            sigma: scalar, share of noise.
            conditioning: conditioning of the B samples.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents [B, ...] into images [B, 3, height, width] in [0, 1]."""

    @property
    def drawn_together(self) -> int | None:
        """Number of samples per forward pass of a rollout or an evaluation; None is all at once."""
        return self.rollout_batch_size or self.micro_batch_size

    def prepare_latents(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Draws standard normal noise [B, ...] fp32, each sample's from its own generator."""
        noise = torch.stack([torch.randn(self.latent_shape, generator=generator) for generator in generators])
        return noise.to(self.device)

    def cut(self, prompts: Sequence[str]) -> list[bool]:
        """Returns, for B prompts, True where the text encoders read the beginning alone; here they read all."""
        return [False] * len(prompts)

    @torch.no_grad()
    def rollout(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        window_seed: int = 0,
        optimizer_step: int = 0,
        on_drawn: Callable[[slice, Tensor], None] | None = None,
        images: Sequence[Image.Image] | None = None,
        start_seeds: Sequence[int] | None = None,
    ) -> Trajectory:
        """Samples one trajectory per prompt with the mixed SDE-ODE sampler.

        Args:
            prompts: B prompts.
            seeds: B seeds; all noise of a sample comes from its own.
            window_seed: places a random window of SDE steps, one for the whole batch.
            optimizer_step: number of optimizer steps taken so far, which places a window that moves on.
            on_drawn: called after every micro-batch with its rows and its images [b, 3, height, width] in [0, 1],
                so that scoring may begin before the whole batch is drawn.
            images: B source images for an editing model; the same object for samples that share one.
            start_seeds: B seeds of the noise to start from, equal for samples that share prompt, source and the Euler
                steps before the first SDE step; None starts each from its own noise.
        """
        sampling = self.sampling
        generator = torch.Generator().manual_seed(window_seed)
        steps = sde_step_indices(
            sampling.sde_steps, sampling.num_steps, generator=generator, optimizer_step=optimizer_step
        )
        conditioning, sigmas = self.encode(prompts, images), self.sigmas(sampling.num_steps)
        second = sampling.solver == "multistep"
        return self._sample(conditioning, seeds, sigmas, steps, on_drawn, start_seeds=start_seeds, second_order=second)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        num_steps: int | None = None,
        images: Sequence[Image.Image] | None = None,
        *,
        on_sampled: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Draws images [B, 3, height, width] in [0, 1] without added noise, as stock pipelines do.

        Args:
            prompts: B prompts.
            seeds: B seeds.
            num_steps: sampler steps; None is evaluation's.
            images: B source images for an editing model.
            on_sampled: called after every micro-batch with the number of its images.
        """
        sigmas = self.sigmas(num_steps or self.sampling.eval_steps or self.sampling.num_steps)
        return self.final_images(self._sample(self.encode(prompts, images), seeds, sigmas, (), on_sampled=on_sampled))

    @torch.no_grad()
    def final_images(self, trajectory: Trajectory) -> Tensor:
        """Decodes the ends of B trajectories into images [B, 3, height, width] in [0, 1]."""
        with self.decoding():
            parts = [self.decode(trajectory.final[rows]) for rows in chunks(len(trajectory), self.drawn_together)]
        return torch.cat(parts)

    def drawing(self) -> AbstractContextManager[None]:
        """Context manager: the policy that draws rollouts, the old one where an objective keeps it."""
        return self.kept("old") if "old" in self.decays else nullcontext()

    def decoding(self) -> AbstractContextManager[None]:
        """Context manager: the networks that `decode` needs are on the policy's device."""
        return nullcontext()

    def replay(self, trajectory: Trajectory, step: int) -> Transition:
        """Returns the current policy's distribution of SDE step number `step` (0..K-1) of a trajectory."""
        return self.transition(
            trajectory.latents[:, step], trajectory.sigmas, trajectory.sde_steps[step], trajectory.conditioning
        )

    def transition(self, latents: Tensor, sigmas: Tensor, step: int, conditioning: Conditioning) -> Transition:
        """Returns the distribution of an SDE step from `latents` [B, ...] at `sigmas[step]`."""
        return sde_transition(
            self._velocity_of(conditioning),
            latents,
            sigmas,
            step,
            sde=sde_by_name(self.sampling.sde_type),
            noise_level=self.sampling.noise_level,
        )

    def _velocity_of(self, conditioning: Conditioning) -> Velocity:
        return lambda latents, sigma: self.velocity(latents, sigma, conditioning)

    def _sample(
        self,
        conditioning: Conditioning,
        seeds: Sequence[int],
        sigmas: Tensor,
        sde_steps: tuple[int, ...],
        on_drawn: Callable[[slice, Tensor], None] | None = None,
        on_sampled: Callable[[int], None] | None = None,
        start_seeds: Sequence[int] | None = None,
        second_order: bool = False,
    ) -> Trajectory:
        sigmas = sigmas.to(self.device)
        first, starts, own_start = 0, None, []
        if start_seeds is not None:
            first = min(sde_steps)
            starts = self._shared_starts(conditioning, start_seeds, sigmas[: first + 1])
            places = {seed: place for place, seed in enumerate(dict.fromkeys(start_seeds))}
            own_start = [places[seed] for seed in start_seeds]
        path: SampledPath | None = None
        for rows in chunks(len(seeds), self.drawn_together):
            draw_noise = partial(self.prepare_latents, generators_for(seeds[rows]))
            start = draw_noise() if starts is None else starts[own_start[rows]]
            path = SampledPath.empty(start[0], len(seeds), sde_steps) if path is None else path
            part = sample(
                self._velocity_of(conditioning.rows(rows)),
                start,
                sigmas,
                sde_steps=sde_steps,
                sde=sde_by_name(self.sampling.sde_type),
                noise_level=self.sampling.noise_level,
                draw_noise=draw_noise,
                first=first,
                second_order=second_order,
                out=path.rows(rows),
            )
            if on_drawn is not None:
                with self.decoding():
                    on_drawn(rows, self.decode(part.final))
            if on_sampled is not None:
                on_sampled(len(part.final))
        assert path is not None
        return Trajectory(
            latents=path.latents,
            next_latents=path.next_latents,
            log_probs=path.log_probs,
            final=path.final,
            sigmas=sigmas,
            sde_steps=sde_steps,
            conditioning=conditioning,
        )

    def _shared_starts(self, conditioning: Conditioning, seeds: Sequence[int], sigmas: Tensor) -> Tensor:
        """Walks down some sigmas by Euler steps; returns latents [D, ...] of the D distinct seeds among B samples."""
        distinct, found = list(dict.fromkeys(seeds)), []
        for part in chunks(len(distinct), self.drawn_together):
            latents = self.prepare_latents(generators_for(distinct[part]))
            velocity = self._velocity_of(conditioning.rows([seeds.index(seed) for seed in distinct[part]]))
            for sigma, following in pairwise(sigmas):
                latents = euler(latents, velocity(latents, sigma), sigma, following)
            found.append(latents)
        return torch.cat(found)


def to_pil(images: Tensor) -> list[Image.Image]:
    """Converts [B, 3, H, W] in [0, 1] to 8-bit RGB images, rounded as diffusers rounds them."""
    array = (images.float().nan_to_num().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in array]
