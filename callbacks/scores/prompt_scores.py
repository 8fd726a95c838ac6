"""Sums of image values by prompt, from which a benchmark's scores and their intervals follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric


@dataclass(frozen=True)
class PromptTable:
    """Sums over the images of P prompts, on the CPU.

    Attributes:
        ids: P prompts' ids.
        tags: P tags, by which results are split.
        sums: column -> [P] float64 sum of its values over a prompt's images.
        counts: column -> [P] float64 images that have a value; the others could not be scored.
        images: [P] float64 images seen.
        prompts: P keys, equal for rows that are one prompt and are resampled together; None if all differ.
    """

    ids: Sequence[str]
    tags: Sequence[str]
    sums: dict[str, Tensor]
    counts: dict[str, Tensor]
    images: Tensor
    prompts: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, indices: Sequence[int]) -> PromptTable:
        """Returns the table of the prompts at these positions."""
        rows = torch.tensor(indices, dtype=torch.long)
        return PromptTable(
            ids=[self.ids[i] for i in indices],
            tags=[self.tags[i] for i in indices],
            sums={name: value[rows] for name, value in self.sums.items()},
            counts={name: value[rows] for name, value in self.counts.items()},
            images=self.images[rows],
            prompts=None if self.prompts is None else [self.prompts[i] for i in indices],
        )

    def tagged(self, tag: str) -> Tensor:
        """Returns a [P] bool mask of the prompts with this tag."""
        return torch.tensor([own == tag for own in self.tags], dtype=torch.bool)


def weighted_mean(table: PromptTable, column: str, weights: Tensor, rows: Tensor | None = None) -> Tensor:
    """Mean of a column over images, each with its prompt's weight.

    Args:
        table: of P prompts.
        column: whose values.
        weights: [R, P] float64; ones give the plain mean, a resampling's counts a bootstrap replicate.
        rows: [P] bool, prompts to take; None is all.

    Returns:
        [R] float64, NaN where no image has a value.
    """
    weights = weights if rows is None else weights * rows
    return (weights @ table.sums[column]) / (weights @ table.counts[column])


def _update(
    row_of: Mapping[str, int], columns: Sequence[str], ids: Sequence[str], values: Sequence[Mapping[str, float]]
) -> Tensor:
    """Sums the values of B images by prompt.

    Args:
        row_of: id -> row of each of P prompts.
        columns: C names of values.
        ids: B prompts' ids, one for every image.
        values: B times column -> value; a column that is missing could not be scored.

    Returns:
        [P, 2 C + 1] float64: sums of the columns, their counts, and the number of images.
    """
    num = len(columns)
    added = torch.zeros(len(row_of), 2 * num + 1, dtype=torch.float64)
    for name, named in zip(ids, values, strict=True):
        row = added[row_of[name]]
        row[-1] += 1
        for column, value in named.items():
            row[columns.index(column)] += value
            row[num + columns.index(column)] += 1
    return added


class PromptScores(Metric):
    """Accumulates the values of images by prompt; sums only, so processes with unequal shares reduce exactly.

    Args:
        ids: P prompts' ids.
        tags: P tags.
        columns: C names of the values, at least one.
        prompts: P keys, equal for rows that are one prompt; None if all differ.

    Example:
        >>> metric = PromptScores(["a", "b"], ["counting", "counting"], ["correct"])
        >>> metric.update(["b", "b"], [{"correct": 1.0}, {"correct": 0.0}])
        >>> metric.update(["a"], [{}])
        >>> table = metric.table()
        >>> table.sums["correct"].tolist(), table.counts["correct"].tolist(), table.images.tolist()
        ([0.0, 1.0], [0.0, 2.0], [1.0, 2.0])
    """

    full_state_update = False
    higher_is_better = True
    totals: Tensor

    def __init__(
        self, ids: Sequence[str], tags: Sequence[str], columns: Sequence[str], prompts: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        self.ids = list(ids)
        self.tags = list(tags)
        self.prompts = prompts
        self.columns = tuple(columns)
        self._row = {name: row for row, name in enumerate(self.ids)}
        assert len(self._row) == len(self.ids) == len(self.tags), "ids are unique within a set"
        # Doubles of every prompt's own sum: the order in which processes add up cannot matter.
        self.add_state("totals", _update(self._row, self.columns, [], []), dist_reduce_fx="sum")

    @classmethod
    def on(
        cls,
        device: torch.device,
        rows: Sequence[tuple[str, str]],
        columns: Sequence[str],
        prompts: Sequence[str] | None = None,
    ) -> PromptScores:
        """Returns an empty metric where a process on this device can reduce it: double precision is rare but on GPUs.

        Args:
            device: of the process.
            rows: P pairs of id and tag.
            columns: names of the values.
            prompts: P keys, equal for rows that are one prompt; None if all differ.
        """
        metric = cls([name for name, _ in rows], [tag for _, tag in rows], columns, prompts)
        metric.update([], [])  # torchmetrics would warn of a process that has no image of these prompts
        return metric.to(device if device.type == "cuda" else torch.device("cpu"))

    def update(self, ids: Sequence[str], values: Sequence[Mapping[str, float]]) -> None:
        """Adds B images, given their prompts' ids and, for each, column -> value (see `_update`)."""
        self.totals += _update(self._row, self.columns, ids, values).to(self.totals.device)

    def compute(self) -> Tensor:
        """Returns the totals over all processes, [P, 2 C + 1]."""
        return self.totals  # never one element, which torchmetrics would squeeze

    def table(self) -> PromptTable:
        """Returns the table over all processes; a collective call, which every process has to make."""
        values, num = self.compute().cpu().clone(), len(self.columns)  # later images must not change it
        return PromptTable(
            ids=self.ids,
            tags=self.tags,
            sums={name: values[:, i] for i, name in enumerate(self.columns)},
            counts={name: values[:, num + i] for i, name in enumerate(self.columns)},
            images=values[:, -1],
            prompts=self.prompts,
        )
