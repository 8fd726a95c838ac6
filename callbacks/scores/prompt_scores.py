"""What a benchmark keeps: sums per prompt, from which every score and its interval follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric


@dataclass(frozen=True)
class PromptTable:
    """What the images of P prompts scored.

    Attributes:
        ids: P prompts' ids.
        tags: P tags, by which results are split.
        sums: column -> [P] float64 sum of its values over a prompt's images.
        counts: column -> [P] float64 images that have a value; the others could not be scored.
        images: [P] float64 images seen.
    """

    ids: Sequence[str]
    tags: Sequence[str]
    sums: dict[str, Tensor]
    counts: dict[str, Tensor]
    images: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, indices: Sequence[int]) -> PromptTable:
        """The table of some prompts."""
        rows = torch.tensor(indices, dtype=torch.long)
        return PromptTable(
            ids=[self.ids[i] for i in indices],
            tags=[self.tags[i] for i in indices],
            sums={name: value[rows] for name, value in self.sums.items()},
            counts={name: value[rows] for name, value in self.counts.items()},
            images=self.images[rows],
        )

    def tagged(self, tag: str) -> Tensor:
        """[P] bool, True for prompts with a tag."""
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


class PromptScores(Metric):
    """Accumulates the values of images by prompt; sums only, so processes with unequal shares reduce exactly.

    Args:
        ids: P prompts' ids.
        tags: P tags.
        columns: names of the values.

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
    sums: Tensor
    counts: Tensor
    images: Tensor

    def __init__(self, ids: Sequence[str], tags: Sequence[str], columns: Sequence[str]) -> None:
        super().__init__()
        self.ids = list(ids)
        self.tags = list(tags)
        self.columns = tuple(columns)
        self._row = {name: row for row, name in enumerate(self.ids)}
        assert len(self._row) == len(self.ids) == len(self.tags), "ids are unique within a set"
        # Doubles of every prompt's own sum: the order in which processes add up cannot matter.
        for state, shape in (("sums", (len(ids), len(columns))), ("counts", (len(ids), len(columns)))):
            self.add_state(state, default=torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", default=torch.zeros(len(ids), dtype=torch.float64), dist_reduce_fx="sum")

    @classmethod
    def on(cls, device: torch.device, rows: Sequence[tuple[str, str]], columns: Sequence[str]) -> PromptScores:
        """An empty metric for P (id, tag), where a process on this device reduces it.

        Double precision, which not every accelerator has; processes on GPUs reduce there.
        """
        metric = cls([name for name, _ in rows], [tag for _, tag in rows], columns)
        return metric.to(device if device.type == "cuda" else torch.device("cpu"))

    def update(self, ids: Sequence[str], values: Sequence[Mapping[str, float]]) -> None:
        """Adds images.

        Args:
            ids: B prompts' ids, once for every image.
            values: B times column -> value; a column that is missing could not be scored.
        """
        for name, named in zip(ids, values, strict=True):
            row = self._row[name]
            self.images[row] += 1
            for column, value in named.items():
                self.sums[row, self.columns.index(column)] += value
                self.counts[row, self.columns.index(column)] += 1

    def compute(self) -> list[list[float]]:
        """P rows: sums of the columns, their counts, images. Plain lists, of which torchmetrics squeezes nothing."""
        rows: list[list[float]] = torch.cat([self.sums, self.counts, self.images[:, None]], 1).tolist()
        return rows

    def table(self) -> PromptTable:
        """The table so far, over all processes; every process has to ask."""
        if not self.update_called:
            self.update([], [])  # a process without prompts; torchmetrics would warn
        num = len(self.columns)
        values = torch.tensor(self.compute(), dtype=torch.float64).reshape(len(self.ids), 2 * num + 1)
        return PromptTable(
            ids=self.ids,
            tags=self.tags,
            sums={name: values[:, i] for i, name in enumerate(self.columns)},
            counts={name: values[:, num + i] for i, name in enumerate(self.columns)},
            images=values[:, -1],
        )
