"""Samples that read their images when asked, and choices and rewordings of a set that leave them unread."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import overload

from datamodules.sample import PromptSample


class LazySamples(Sequence[PromptSample]):
    """Samples whose images are read when they are asked for: thousands of images would not fit into memory."""

    @abstractmethod
    def without_images(self) -> Sequence[PromptSample]:
        """The same samples, their images left where they are."""

    @abstractmethod
    def at(self, index: int) -> PromptSample:
        """One sample with its image; `index` is not negative."""

    @abstractmethod
    def some(self, index: slice) -> Sequence[PromptSample]:
        """Some of the samples."""

    @overload
    def __getitem__(self, index: int) -> PromptSample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[PromptSample]: ...
    def __getitem__(self, index: int | slice) -> PromptSample | Sequence[PromptSample]:
        """A sample with its image, or some of the samples."""
        return self.some(index) if isinstance(index, slice) else self.at(range(len(self))[index])


class Chosen(LazySamples):
    """Some samples of a set.

    Args:
        samples: the set.
        rows: which of them, in this order.
    """

    def __init__(self, samples: Sequence[PromptSample], rows: Sequence[int]) -> None:
        self.samples = samples
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def without_images(self) -> list[PromptSample]:
        """The chosen samples, their images left where they are."""
        samples = bare(self.samples)
        return [samples[row] for row in self.rows]

    def at(self, index: int) -> PromptSample:
        """One chosen sample."""
        return self.samples[self.rows[index]]

    def some(self, index: slice) -> Chosen:
        """Some of the chosen samples."""
        return Chosen(self.samples, self.rows[index])


def spread(total: int, limit: int | None) -> list[int]:
    """At most `limit` rows, spread evenly over `total`, since files may be sorted; None takes all.

    >>> spread(10, 4), spread(2, 4)
    ([0, 2, 5, 7], [0, 1])
    """
    if limit is None or limit >= total:
        return list(range(total))
    return [number * total // limit for number in range(limit)]


class Reworded(LazySamples):
    """Samples of a set in other words, in its order; those without other words are left out.

    Args:
        samples: the originals.
        wordings: row of the original -> what the models are given in its place.
    """

    def __init__(self, samples: Sequence[PromptSample], wordings: Mapping[int, str]) -> None:
        self.samples = samples
        self.rows = sorted(wordings.items())

    def __len__(self) -> int:
        return len(self.rows)

    def without_images(self) -> list[PromptSample]:
        """The reworded samples, their images left where they are."""
        samples = bare(self.samples)
        return [replace(samples[row], wording=wording) for row, wording in self.rows]

    def at(self, index: int) -> PromptSample:
        """One reworded sample."""
        row, wording = self.rows[index]
        return replace(self.samples[row], wording=wording)

    def some(self, index: slice) -> Reworded:
        """Some of the reworded samples."""
        return Reworded(self.samples, dict(self.rows[index]))


def bare(samples: Sequence[PromptSample]) -> Sequence[PromptSample]:
    """Samples to look through for anything but images."""
    return samples.without_images() if isinstance(samples, LazySamples) else samples
