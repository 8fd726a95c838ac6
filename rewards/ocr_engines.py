"""Engines that read text from images. Scores by different engines, or versions of one, are not comparable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image, ImageDraw

from rewards.arguments import check_minimum
from rewards.packages import installed

Line = tuple[str, float]
"""A line of text as recognised, and its confidence in 0..1."""


@runtime_checkable
class TextReader(Protocol):
    """Protocol of OCR engines. They may also have `version` and `load()`, which raises errors of configuration."""

    def read(self, images: Sequence[Image.Image]) -> list[list[Line]]:
        """Reads the text in images.

        Args:
            images: B images.

        Returns:
            B lists of lines in the engine's reading order (top to bottom, then left to right); empty without text.
        """
        ...


class RapidOCRReader:
    """PaddleOCR's models (PP-OCR, Chinese and English) on onnxruntime and the CPU; they come inside the package.

    Args:
        limit_side_len: images whose shorter side has fewer pixels are enlarged to it before text is looked for.
        min_confidence: lines below are dropped, in 0..1; 0.5 is also PaddleOCR 2.x's own rule (`drop_score`).
        threads: threads for one image; more pay only where cores idle.
    """

    def __init__(self, limit_side_len: int = 512, min_confidence: float = 0.5, threads: int = 1) -> None:
        if limit_side_len < 32:
            raise ValueError(f"RapidOCRReader has limit_side_len={limit_side_len}, use at least 32 pixels.")
        check_minimum("RapidOCRReader", 1, threads=threads)
        _check_confidence(self, min_confidence)
        self.limit_side_len = limit_side_len
        self.min_confidence = min_confidence
        self.threads = threads
        self._engine: Any = None

    @property
    def version(self) -> str:
        """Version of the reading: the package (for the models inside) and the settings that change what is read."""
        return f"{installed('rapidocr')} limit_side_len={self.limit_side_len} min_confidence={self.min_confidence}"

    def load(self) -> None:
        """Loads the networks that find lines and read them."""
        if self._engine is not None:
            return
        with _needs("rapidocr", "pip install -e '.[ocr]'"):
            from rapidocr import RapidOCR

            engine: Any = RapidOCR(
                params={
                    "Global.use_cls": False,  # looks for upside-down lines, which images have no reason to hold
                    "Global.text_score": self.min_confidence,
                    "Global.log_level": "error",  # it warns of every image without text
                    "EngineConfig.onnxruntime.intra_op_num_threads": self.threads,
                    "EngineConfig.onnxruntime.inter_op_num_threads": 1,
                    "Det.limit_side_len": self.limit_side_len,
                    "Det.limit_type": "min",
                }
            )
            # Each network loads when first needed. With this image both are, so that what is missing shows now.
            sign = Image.new("RGB", (128, 64), "white")
            ImageDraw.Draw(sign).text((64, 32), "load", fill="black", anchor="mm", font_size=32)
            engine(_bgr(sign))
        self._engine = engine

    def read(self, images: Sequence[Image.Image]) -> list[list[Line]]:
        """Reads B images, one after another."""
        self.load()
        return [self._read_one(image) for image in images]

    def _read_one(self, image: Image.Image) -> list[Line]:
        found = self._engine(_bgr(image))
        # Boxes without texts (a failed recogniser) come as another class, which has no `txts`: an error, as it should.
        if found.txts is None:
            return []
        return [(str(text), float(confidence)) for text, confidence in zip(found.txts, found.scores, strict=True)]


class PaddleOCRReader:
    """PaddleOCR 2.x or 3.x, whichever is installed. Published OCR scores used 2.9.1 on the CPU with `lang="en"`.

    Written from the documentation of both interfaces and tested against their documented replies only: neither could
    be run where this was written. Published trainers hand it RGB arrays; it expects BGR, which is what it gets here.

    Args:
        lang: language of the recogniser.
        use_gpu: runs on the GPU (needs `paddlepaddle-gpu`).
        min_confidence: lines below are dropped, in 0..1; 0.5 is what 2.x does by itself, while 3.x keeps all.
    """

    def __init__(self, lang: str = "en", use_gpu: bool = False, min_confidence: float = 0.5) -> None:
        _check_confidence(self, min_confidence)
        self.lang = lang
        self.use_gpu = use_gpu
        self.min_confidence = min_confidence
        self._engine: Any = None
        self._major = 0

    @property
    def version(self) -> str:
        """Version of the reading: the package (for its default models) and the settings that change what is read."""
        return f"{installed('paddleocr')} lang={self.lang} min_confidence={self.min_confidence}"

    def load(self) -> None:
        """Loads the models; PaddleOCR downloads them on first use."""
        if self._engine is not None:
            return
        command = "pip install 'paddleocr==2.9.1' 'paddlepaddle<3'"
        with _needs("paddleocr", command):
            from paddleocr import PaddleOCR

            self._major = int(metadata.version("paddleocr").split(".")[0])
            if self._major < 3:
                self._engine = PaddleOCR(
                    use_angle_cls=False,
                    lang=self.lang,
                    show_log=False,
                    use_gpu=self.use_gpu,
                    drop_score=self.min_confidence,
                )
            else:
                self._engine = PaddleOCR(
                    lang=self.lang,
                    use_doc_orientation_classify=False,
                    use_doc_unwarping=False,
                    use_textline_orientation=False,
                    text_rec_score_thresh=self.min_confidence,
                    device="gpu" if self.use_gpu else "cpu",
                )

    def read(self, images: Sequence[Image.Image]) -> list[list[Line]]:
        """Reads B images, one after another."""
        self.load()
        return [self._read_one(_bgr(image)) for image in images]

    def _read_one(self, image: np.ndarray[Any, Any]) -> list[Line]:
        if self._major < 3:
            (page,) = self._engine.ocr(image, cls=False)
            return [(text, float(confidence)) for _, (text, confidence) in page or []]  # None without text
        (page,) = self._engine.predict(image)
        return [(text, float(score)) for text, score in zip(page["rec_texts"], page["rec_scores"], strict=True)]


def _bgr(image: Image.Image) -> np.ndarray[Any, Any]:
    """Returns [height, width, 3] bytes in BGR, which all these engines take an array to be."""
    return np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])


def _check_confidence(reader: object, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{type(reader).__name__} has min_confidence={value}, use a number from 0 to 1.")


@contextmanager
def _needs(package: str, command: str) -> Iterator[None]:
    """Context manager: turns the ImportError of a missing package, or of one that it needs, into a ValueError."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{package} cannot be used ({error}): run `{command}`.") from error
