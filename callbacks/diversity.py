"""`Diversity`: how similar the images of one prompt are, and how rewriting changes that (paper, Figure 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from callbacks.results_file import add_results
from callbacks.scores.bootstrap import interval, resample
from callbacks.scores.prompt_scores import PromptScores, PromptTable, weighted_mean
from datamodules.base import Chosen, PromptDataModule, PromptSample, bare, contents
from datamodules.chunks import chunks
from lightning_modules.evaluation import EvaluatedAgents
from lightning_modules.seeding import seed_of
from rewards.base import Reward
from rewards.clip import ClipEncoder
from rewards.encoders import Encoder, group_columns, group_scores

ARMS = ("same_prompt", "rewrites", "rewrites_shared_noise")
"""The prompt K times; K sampled rewrites with the same K noises; these rewrites with the first of the noises."""
DIFFERENCE = "rewrites - same_prompt"
DISTINCT = "distinct_rewrites"
VIT_G = "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"
"""The paper says no more than CLIP ViT-g-14; the other one on the hub is `laion/CLIP-ViT-g-14-laion2B-s34B-b88K`."""

T = TypeVar("T")
Scores = dict[str, dict[str, Tensor]]
"""Arm -> score -> [R]."""


class Diversity(L.Callback):
    """Draws K images of a prompt in three ways and compares the images of each group.

    `same_prompt`: the prompt with K noises. `rewrites`: K rewrites sampled from the refiner, with the same K noises.
    `rewrites_shared_noise`: these rewrites with one noise, so that wording alone makes them differ. Without a refiner
    there is the first arm only. Each has

    - `image_similarity` (II-Sim): mean cosine of two different images of a group;
    - `text_similarity` (TI-Sim): mean cosine of an image with the original prompt, if the encoder reads texts;
    - `distinct_contents`: how many of the K show different things, if the encoder can tell;
    - `distinct_rewrites`: share of different ones among the K rewrites;
    - the mean table value of `reward`, under its name.

    At the end of `lightning test` and `lightning validate` it prints a table and writes it into `results.json`, with
    95 % intervals over prompts and the difference of the first two arms at equal prompts and noise. Logged as
    `test/diversity/<set>/<arm>/<score>` (`val/...` in fit and validate).

    Args:
        encoder: embeds the images; null is CLIP ViT-g-14 as in the paper.
        images_per_prompt: K images in a group, 2 or more (the paper does not say how many).
        num_prompts: how many prompts of each set, from all tags alike; null is all.
        sets: evaluation sets to take prompts from; null is the first one that rewords no other.
        reward: also scores the images against their original prompts (the paper: PickScore).
        every_n_validations: also at every n-th validation within a fit, starting with the first; null is never.
        num_prompts_in_fit: how many prompts of each set there.
        resamples: of the bootstrap over prompts.
        seed: of the choice of prompts, of the noise and of the sampled rewrites.
        name: what results and logs are called; two of this callback in a run need two names.
    """

    def __init__(
        self,
        encoder: Encoder | None = None,
        images_per_prompt: int = 8,
        num_prompts: int | None = 64,
        sets: list[str] | None = None,
        reward: Reward | None = None,
        every_n_validations: int | None = None,
        num_prompts_in_fit: int = 8,
        resamples: int = 1000,
        seed: int = 0,
        name: str = "diversity",
    ) -> None:
        for argument, value, least in (
            ("images_per_prompt", images_per_prompt, 2),
            ("num_prompts", num_prompts, 1),
            ("every_n_validations", every_n_validations, 1),
            ("num_prompts_in_fit", num_prompts_in_fit, 1),
            ("resamples", resamples, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"Diversity has {argument}={value}, use at least {least}.")
        if not name.startswith("diversity"):
            raise ValueError(f"Diversity has the name {name!r}: let it begin with diversity, as its table's does.")
        if sets == []:
            raise ValueError("Diversity has an empty list of `sets`: name some, or give null for the first one.")
        self.encoder: Encoder = ClipEncoder(VIT_G) if encoder is None else encoder
        self.images_per_prompt = images_per_prompt
        self.num_prompts = num_prompts
        self.sets = sets
        self.reward = reward
        self.every_n_validations = every_n_validations
        self.num_prompts_in_fit = num_prompts_in_fit
        self.resamples = resamples
        self.seed = seed
        self.name = name
        self.tables: dict[str, PromptTable] = {}
        """Set -> scores of its prompts' groups in the latest measurement, all ranks; columns `<arm>/<score>`."""
        self.results: dict[str, dict[str, dict[str, float]]] = {}
        """Set -> arm -> score -> value, of the latest measurement."""
        self.intervals: dict[str, dict[str, dict[str, list[float]]]] = {}
        """Set -> arm -> score -> both ends of its 95 % interval."""
        self._validations = 0

    # --- hooks ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Loads the scorers now, so that a missing one is found before hours of drawing.

        Raises:
            ValueError: if the module does not draw, two such callbacks have one name, or the moving average of the
                weights stands before this callback.
        """
        if stage == "predict" or (stage == "fit" and self.every_n_validations is None):
            return
        if not isinstance(pl_module, EvaluatedAgents):
            raise ValueError(f"Diversity has nothing to draw with in {type(pl_module).__name__}: leave it out.")
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        others = [other for other in callbacks if isinstance(other, Diversity) and other is not self]
        if any(other.name == self.name for other in others):
            raise ValueError(f"two Diversity callbacks are called {self.name!r}: give one of them another `name`.")
        earlier = callbacks[: callbacks.index(self)]
        if stage == "fit" and any(isinstance(other, WeightAveraging) for other in earlier):
            raise ValueError(
                "the moving average takes its weights back before Diversity draws: list Diversity before it in "
                "`trainer.callbacks`."
            )
        with _own_randomness():
            self.encoder.load()
            if self.reward is not None:
                self.reward.load()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raises ValueError if `sets` names an unknown set, before anything is drawn."""
        if trainer.state.fn != TrainerFn.FITTING or self.every_n_validations is not None:
            self._names(trainer.datamodule)  # type: ignore[attr-defined]

    on_test_start = on_validation_start

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draws and compares groups of images; within a fit only at every n-th validation."""
        if trainer.sanity_checking:
            return
        num = self.num_prompts
        if trainer.state.fn == TrainerFn.FITTING:
            if self.every_n_validations is None or self._validations % self.every_n_validations:
                return
            num = self.num_prompts_in_fit
        assert isinstance(pl_module, EvaluatedAgents)
        with torch.no_grad(), _own_randomness():
            self._measure(trainer, pl_module, num)

    on_test_epoch_end = on_validation_epoch_end

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints the tables, except in the middle of a fit, where it counts validations that are made to their end."""
        if trainer.state.fn != TrainerFn.FITTING:
            self.on_fit_end(trainer, pl_module)
        elif not trainer.sanity_checking:
            self._validations += 1

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints the latest tables."""
        if trainer.is_global_zero:
            for name in self.results:
                Console().print(self._shown(name))

    on_test_end = on_fit_end

    def _shown(self, name: str) -> Table:
        """Returns the console's table: a line for each score and arm, so that arms stand below one another."""
        title = f"{self.name} of {name}: {self.images_per_prompt} images a prompt, {self.encoder.version}"
        table = Table("score", "arm", title=title)
        table.add_column("value", justify="right")
        table.add_column("95 % interval", justify="right")
        results, intervals = self.results[name], self.intervals[name]
        for score in dict.fromkeys(score for scores in results.values() for score in scores):
            there = [arm for arm in results if score in results[arm]]
            for arm in there:
                low, high = intervals[arm][score]
                cells = (f"{results[arm][score]:.3f}", f"{low:.3f} to {high:.3f}")
                table.add_row(score if arm == there[0] else "", arm, *cells, end_section=arm == there[-1])
        return table

    @property
    def state_key(self) -> str:
        """Key of this callback's state in checkpoints."""
        return f"Diversity {self.name} by {self.encoder.version}"

    def state_dict(self) -> dict[str, Any]:
        """Returns the count of validations, so that a resumed fit measures when an unbroken one would."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the count of validations."""
        self._validations = state_dict["validations"]

    # --- measuring --------------------------------------------------------------------------------------------------

    def _names(self, data: PromptDataModule) -> list[str]:
        if self.sets is None:
            return [name for name in data.eval_sets if name not in data.originals][:1]
        for name in self.sets:
            if name not in data.eval_sets:
                raise ValueError(
                    f"Diversity's `sets` names {name!r}, which is not evaluated here: use some of "
                    f"{', '.join(data.eval_sets)}."
                )
        return self.sets

    def _measure(self, trainer: L.Trainer, agents: EvaluatedAgents, num: int | None) -> None:
        data: PromptDataModule = trainer.datamodule  # type: ignore[attr-defined]
        self.tables, self.results, self.intervals = {}, {}, {}
        for name in self._names(data):
            table = self.tables[name] = self._table(trainer, agents, data, name, num)
            ones = torch.ones(1, len(table), dtype=torch.float64)
            # All tags together: a few prompts may be one of each tag, and within it nothing would vary.
            replicates = summarize(table, resample([""] * len(table), self.resamples, self.seed, table.prompts))
            self.results[name] = _each(summarize(table, ones), float)
            self.intervals[name] = _each(replicates, lambda values: list(interval(values)))
            prefix = f"{'test' if trainer.testing else 'val'}/{self.name}/{name}"
            for arm in ARMS:
                for score, value in self.results[name].get(arm, {}).items():
                    agents.log(f"{prefix}/{arm}/{score}", value, rank_zero_only=True)
        settings = {"encoder": self.encoder.version, "images_per_prompt": self.images_per_prompt}
        found = {**self.results, "intervals": self.intervals}
        add_results(trainer, {self.name: found, f"settings/{self.name}": settings})

    def _table(
        self, trainer: L.Trainer, agents: EvaluatedAgents, data: PromptDataModule, name: str, num: int | None
    ) -> PromptTable:
        """Draws and scores the groups of `num` of a set's prompts; every process draws its share."""
        refined = agents.language is not None and name not in data.unrefined
        arms = ARMS if refined else ARMS[:1]
        samples = data.eval_sets[name]
        chosen = by_tag([(sample.tag, sample.id) for sample in bare(samples)], num, self.seed)
        few = [bare(samples)[row] for row in chosen]
        names = group_columns(self.encoder, self.reward)
        columns = [f"{arm}/{n}" for arm in arms for n in (names if arm == "same_prompt" else [*names, DISTINCT])]
        keys = contents(Chosen(samples, chosen))
        metric = PromptScores.on(agents.device, [(sample.id, sample.tag) for sample in few], columns, keys)
        # Rewrites are drawn K at a time, so other images belong to another K or seed.
        kept_as = f"{name}.diversity-{self.images_per_prompt}-{self.seed}"
        share = chosen[trainer.global_rank :: trainer.world_size]
        batches = [share[rows] for rows in chunks(len(share), data.eval_batch_size)]
        bar: Any = trainer.progress_bar_callback
        quiet = not trainer.is_global_zero or bar is None or bar.is_disabled
        with Progress(disable=quiet, transient=True) as progress:
            total = len(share) * len(arms) * self.images_per_prompt
            task = progress.add_task(f"{self.name} of {name}", total=total)
            for rows in batches:
                batch = [samples[row] for row in rows]
                values: list[dict[str, float]] = [{} for _ in batch]
                wordings = self._wordings(trainer, agents, batch) if refined else []
                for arm in arms:
                    prompts = [[s.asked for s in batch]] * self.images_per_prompt if arm == "same_prompt" else wordings
                    images = []
                    for k, texts in enumerate(prompts):
                        number = 0 if arm == "rewrites_shared_noise" else k
                        seeds = [seed_of("diversity", self.seed, sample.id, number) for sample in batch]
                        with trainer.precision_plugin.forward_context():
                            images.append(agents.draw(kept_as, arm, k, batch, texts, seeds))
                        progress.advance(task, len(batch))
                    for row, scores in enumerate(group_scores(self.encoder, self.reward, batch, images)):
                        if arm != "same_prompt":
                            scores[DISTINCT] = len({texts[row] for texts in wordings}) / len(wordings)
                        values[row] |= {f"{arm}/{score}": value for score, value in scores.items()}
                metric.update([sample.id for sample in batch], values)
        return metric.table()

    def _wordings(
        self, trainer: L.Trainer, agents: EvaluatedAgents, samples: Sequence[PromptSample]
    ) -> list[list[str]]:
        """Samples K rewrites of each of B prompts, returned as K lists of B.

        Each prompt's are drawn alone and by its own seed: they depend on no batch, process or earlier sampling.
        """
        assert agents.language is not None
        rewrites = []
        for sample in samples:
            torch.manual_seed(seed_of("diversity", self.seed, sample.id))
            with trainer.precision_plugin.forward_context():
                rewrites.append(agents.language.refine([sample], self.images_per_prompt).rewrites)
        return [list(texts) for texts in zip(*rewrites, strict=True)]


def summarize(table: PromptTable, weights: Tensor) -> Scores:
    """Averages the scores of every arm, and takes the difference of rewrites to the prompt as it is.

    Args:
        table: groups of P prompts; columns `<arm>/<score>`.
        weights: [R, P] weights of the prompts.

    Returns:
        Arm -> score -> [R]; the difference stands beside the arms where there are rewrites.
    """
    scores: Scores = {}
    for column in table.sums:
        arm, _, score = column.partition("/")
        scores.setdefault(arm, {})[score] = weighted_mean(table, column, weights)
    if "rewrites" in scores:
        same = scores["same_prompt"]
        both = {score: value - same[score] for score, value in scores["rewrites"].items() if score in same}
        scores[DIFFERENCE] = both
    return scores


def by_tag(prompts: Sequence[tuple[str, str]], num: int | None, seed: int) -> list[int]:
    """Chooses prompts from all tags in proportion; returns their rows, rising.

    Every n-th row would not do: tags and styles often alternate.

    Args:
        prompts: tag and id of each.
        num: how many; None is all.
        seed: decides which of a tag's prompts are chosen.

    >>> by_tag([("red", "a"), ("blue", "b"), ("red", "c"), ("blue", "d")], 2, seed=0)
    [1, 2]
    """
    total = len(prompts)
    tags = list(dict.fromkeys(tag for tag, _ in prompts))
    keys = [(tags.index(tag), seed_of("spread", seed, name)) for tag, name in prompts]
    grouped = sorted(range(total), key=keys.__getitem__)
    num = total if num is None else min(num, total)
    return sorted(grouped[i * total // num] for i in range(num))


def _each(scores: Scores, value: Callable[[Tensor], T]) -> dict[str, dict[str, T]]:
    return {arm: {score: value(replicates) for score, replicates in named.items()} for arm, named in scores.items()}


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Context manager: restores torch's random state at its end, so that training draws the same numbers."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield
