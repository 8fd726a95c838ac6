"""Sequences of samples whose images are read on access, and selections and rewordings that leave them unread."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import overload

from datamodules.sample import PromptSample


class LazySamples(Sequence[PromptSample]):
    """Sequence of samples whose images are read on access, since thousands of images would not fit into memory."""

    @abstractmethod
    def without_images(self) -> Sequence[PromptSample]:
        """Returns the samples with `image` None, without reading the images."""

    def contents(self) -> list[str]:
        """Returns a key of each sample, as `contents` does; here every sample is a prompt of its own."""
        return [sample.id for sample in self.without_images()]

    @abstractmethod
    def at(self, index: int) -> PromptSample:
        """Returns one sample with its image; `index` is not negative."""

    @abstractmethod
    def some(self, index: slice) -> Sequence[PromptSample]:
        """Returns some of the samples, whose images stay unread."""

    @overload
    def __getitem__(self, index: int) -> PromptSample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[PromptSample]: ...
    def __getitem__(self, index: int | slice) -> PromptSample | Sequence[PromptSample]:
        """Returns a sample with its image, or for a slice some of the samples."""
        return self.some(index) if isinstance(index, slice) else self.at(range(len(self))[index])


class Chosen(LazySamples):
    """Selection of samples of a set.

    Args:
        samples: the set.
        rows: indices of the selected samples, in this order.
    """

    def __init__(self, samples: Sequence[PromptSample], rows: Sequence[int]) -> None:
        self.samples = samples
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def without_images(self) -> list[PromptSample]:
        """Returns the selected samples without reading their images."""
        samples = bare(self.samples)
        return [samples[row] for row in self.rows]

    def contents(self) -> list[str]:
        """Returns the keys of the selected samples."""
        keys = contents(self.samples)
        return [keys[row] for row in self.rows]

    def at(self, index: int) -> PromptSample:
        """Returns one selected sample with its image."""
        return self.samples[self.rows[index]]

    def some(self, index: slice) -> Chosen:
        """Returns a selection from this selection."""
        return Chosen(self.samples, self.rows[index])


def spread(total: int, limit: int | None) -> list[int]:
    """Returns at most `limit` of `total` indices, spread evenly, since files may be sorted; None takes all.

    >>> spread(10, 4), spread(2, 4)
    ([0, 2, 5, 7], [0, 1])
    """
    if limit is None or limit >= total:
        return list(range(total))
    return [number * total // limit for number in range(limit)]


class Reworded(LazySamples):
    """Samples of a set in other words, in the set's order; samples without other words are left out.

    Args:
        samples: the originals.
        wordings: index of the original -> text that the models get in place of its prompt.
    """

    def __init__(self, samples: Sequence[PromptSample], wordings: Mapping[int, str]) -> None:
        self.samples = samples
        self.rows = sorted(wordings.items())

    def __len__(self) -> int:
        return len(self.rows)

    def without_images(self) -> list[PromptSample]:
        """Returns the reworded samples without reading their images."""
        samples = bare(self.samples)
        return [replace(samples[row], wording=wording) for row, wording in self.rows]

    def contents(self) -> list[str]:
        """Returns the keys of the originals."""
        keys = contents(self.samples)
        return [keys[row] for row, _ in self.rows]

    def at(self, index: int) -> PromptSample:
        """Returns one reworded sample with its image."""
        row, wording = self.rows[index]
        return replace(self.samples[row], wording=wording)

    def some(self, index: slice) -> Reworded:
        """Returns some of the reworded samples, whose images stay unread."""
        return Reworded(self.samples, dict(self.rows[index]))


def bare(samples: Sequence[PromptSample]) -> Sequence[PromptSample]:
    """Returns the samples for use of anything but their images, which lazy samples do not read then."""
    return samples.without_images() if isinstance(samples, LazySamples) else samples


def contents(samples: Sequence[PromptSample]) -> list[str]:
    """Returns a key of each sample, equal for samples that are the same prompt (see `PromptSample.content`)."""
    return samples.contents() if isinstance(samples, LazySamples) else [sample.content for sample in samples]
