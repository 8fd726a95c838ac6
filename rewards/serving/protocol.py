"""The protocol between reward server and client: JSON checked by pydantic, images as plain files.

A request is multipart: the part `request` holds a `ScoreRequest` as JSON, every other part is one image that an
item names. The reply is a `ScoreReply`, whose results say which item they are of. Numbers cross exactly: JSON carries
the shortest text that reads back as the same float. Neither end ever unpickles, opens a path or follows a URL.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from io import BytesIO
from typing import Annotated, Any, Literal
from uuid import UUID

from PIL import Image
from pydantic import BaseModel, ConfigDict, FailFast, Field, FiniteFloat, JsonValue, StringConstraints, field_validator

from rewards.base import Score

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_DETAIL = 8192
"""Longest `detail` of one score, in characters of JSON; a longer one is replaced by a note."""
MAX_TEXT = 500
"""Longest reason and longest name, in characters."""
MAX_DEPTH = 6
"""How deep `detail` may nest, and `parts` within `parts`."""

MAX_SCANS = 64
"""Most scans of one JPEG; encoders make about 10, and each costs as much time as an image of its own."""

Z_RLE = 3  # of zlib.h
START_OF_SCAN = b"\xff\xda"  # ITU-T T.81, table B.1; in compressed data a zero follows every FF

PART_NAME = "^[A-Za-z0-9_-]{1,64}$"
PartName = Annotated[str, StringConstraints(pattern=PART_NAME)]


class ProtocolModel(BaseModel):
    """Base of all messages: refuses unknown fields, values of another type, and NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Item(ProtocolModel):
    """One image to score, with the fields of its `PromptSample`."""

    prompt: str = Field(max_length=20_000)
    images: list[PartName] = Field(min_length=1, max_length=1, description="the part with the image to score")
    source: list[PartName] = Field(default=[], max_length=1, description="the part with an edit's source image")
    metadata: dict[str, JsonValue] = {}
    tag: str = Field("", max_length=1000)
    id: str = Field("", max_length=1000)

    @field_validator("metadata")
    @classmethod
    def _finite(cls, metadata: dict[str, JsonValue]) -> dict[str, JsonValue]:
        json.dumps(metadata, allow_nan=False)
        return metadata


class ScoreRequest(ProtocolModel):
    """The JSON of the part `request`. A repeated `id` gets the first one's answer and is not scored again."""

    version: Literal[1] = Field(alias="schema")
    id: UUID
    reward: str = Field(max_length=200)
    # The first wrong item ends it: a report on each of a million would cost gigabytes.
    items: Annotated[list[Item], FailFast()] = Field(min_length=1)


class Scored(ProtocolModel):
    """Result of an item that has a score (see `rewards.base.Score`)."""

    item: str = ""
    """Id of the item, see `item_id`; empty in parts."""
    valid: Literal[True]
    native: FiniteFloat
    table: FiniteFloat
    rl: FiniteFloat
    detail: dict[str, JsonValue] = {}
    parts: dict[str, Scored | Unscored] = {}
    weights: dict[str, FiniteFloat] = {}


class Unscored(ProtocolModel):
    """Result of an item without a score: what went wrong.

    `error` is one of bad_image, too_many_pixels, missing_need (the item lacks what the reward needs), unscorable (the
    scorer said so), scorer_error (it raised), too_slow (it took over `score_timeout`), non_finite, wrong_length (it
    returned another number of scores).
    """

    item: str = ""
    """Id of the item, see `item_id`; empty in parts."""
    valid: Literal[False]
    error: str
    reason: str = ""
    detail: dict[str, JsonValue] = {}
    parts: dict[str, Scored | Unscored] = {}


Result = Scored | Unscored


class ScoreReply(ProtocolModel):
    """The answer to a `ScoreRequest`: one result per item, in the order of the items. Schema 1 had no `item`."""

    version: Literal[2] = Field(2, alias="schema")
    id: UUID
    reward_version: str
    results: list[Result]


class RewardInfo(ProtocolModel):
    """A reward as its server describes it. A null in `native_range` is an infinity."""

    name: str
    version: str
    native_range: tuple[FiniteFloat | None, FiniteFloat | None]
    needs: list[str]


class RewardList(ProtocolModel):
    """The answer to `GET /v1/rewards`. The limits are per request, `max_pixels` per image.

    A server of schema 1 sends results without `item`; clients refuse it.
    """

    version: Literal[2] = Field(2, alias="schema")
    rewards: list[RewardInfo]
    max_items: int
    max_request_bytes: int
    max_pixels: int


class Health(ProtocolModel):
    """The answer to `GET /v1/health`: accepted requests that wait for their answer, and items that wait for a batch."""

    ready: bool
    in_flight: int
    queue: int


class Problem(ProtocolModel):
    """The body of every answer that is not a success."""

    detail: str


def item_id(place: int, item: Item, image: bytes, source: bytes | None) -> str:
    """Names a request's item by its place and its content; both ends compute it.

    A result is matched by it, so that one that stands in another place, or was given to another image, is noticed.

    Args:
        place: of the item in its request, from 0.
        item: the item.
        image: the file of its image.
        source: the file of its source image, if it has one.
    """
    files = b"".join(hashlib.sha256(data or b"").digest() for data in (image, source))
    texts = "\0".join((item.id, item.tag, item.prompt)).encode()
    return f"{place}-{hashlib.sha256(files + texts).hexdigest()[:32]}"


# --- scores -----------------------------------------------------------------------------------------------------------


def to_result(score: Score, depth: int = MAX_DEPTH) -> Result:
    """Converts a score for a reply. A number that is not finite makes it invalid, whatever the scorer says."""
    detail = _bound_detail(score.detail)
    parts = {_cut(name): to_result(part, depth - 1) for name, part in score.parts.items()} if depth else {}
    if not score.valid:
        reason = _cut(detail.pop("reason", ""))
        return Unscored(valid=False, error="unscorable", reason=reason, detail=detail, parts=parts)
    native, table, rl = float(score.native), float(score.table), float(score.rl)
    if not all(map(math.isfinite, (native, table, rl))):
        return Unscored(valid=False, error="non_finite", reason="the scorer returned NaN or infinity", parts=parts)
    weights = {_cut(name): float(weight) for name, weight in score.weights.items()} if parts else {}
    return Scored(valid=True, native=native, table=table, rl=rl, detail=detail, parts=parts, weights=weights)


def to_score(result: Result) -> Score:
    """Converts a result of a reply back to a score."""
    parts = {name: to_score(part) for name, part in result.parts.items()}
    if isinstance(result, Scored):
        detail, weights = dict(result.detail), dict(result.weights)
        return Score(result.native, result.table, result.rl, detail=detail, parts=parts, weights=weights)
    reason = result.reason if result.error == "unscorable" else f"{result.error}: {result.reason}"
    return Score(math.nan, math.nan, math.nan, valid=False, detail={**result.detail, "reason": reason}, parts=parts)


def _bound_detail(detail: Mapping[str, Any]) -> dict[str, JsonValue]:
    plain: dict[str, JsonValue] = {_cut(key): _to_json(value) for key, value in detail.items()}
    length = len(json.dumps(plain))
    return plain if length <= MAX_DETAIL else {"left_out": f"{length} characters of detail"}


def _to_json(value: Any, depth: int = MAX_DEPTH) -> JsonValue:
    """Copies a value as JSON: numbers that are not finite become null, objects that are no data their type's name."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _cut(value, MAX_DETAIL)
    if isinstance(value, int):
        return int(value) if abs(value) < 2**63 else None
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if depth and isinstance(value, Mapping):
        return {_cut(key): _to_json(item, depth - 1) for key, item in value.items()}
    if depth and isinstance(value, (list, tuple, set, frozenset)):
        return [_to_json(item, depth - 1) for item in value]
    if depth and callable(getattr(value, "tolist", None)):  # arrays, tensors and their scalars
        return _to_json(value.tolist(), depth - 1)
    return f"<{type(value).__name__}>"


def _cut(value: object, longest: int = MAX_TEXT) -> str:
    return str(value)[:longest].encode(errors="replace").decode()  # a lone surrogate has no UTF-8


# --- images ---------------------------------------------------------------------------------------------------------


class BadImage(ValueError):
    """An image that cannot be scored; `error` is the code of `Unscored.error`."""

    def __init__(self, error: str, reason: str) -> None:
        super().__init__(reason)
        self.error = error


def encode_image(image: Image.Image) -> bytes:
    """Encodes an image as a PNG file, lossless.

    Once filtered, a photograph's bytes hardly repeat, so zlib need only look for runs: a 512 x 512 image takes
    12-18 ms in place of the default's 52-76, and is as small.
    """
    buffer = BytesIO()
    try:
        image.save(buffer, "PNG", compress_level=1, compress_type=Z_RLE)
    except OSError as error:
        raise ValueError(f"an image of mode {image.mode} cannot be sent as PNG: convert it to RGB.") from error
    return buffer.getvalue()


def decode_image(data: bytes, max_pixels: int) -> Image.Image:
    """Decodes an image from the bytes of a file, which may be hostile.

    Args:
        data: a whole PNG, JPEG or WEBP file.
        max_pixels: most pixels; asked of the header, before anything is decoded. At most PIL's own limit.

    Raises:
        BadImage: if the file is none of the three, damaged, cut short, too large or made to take long.
    """
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise BadImage(
                    "too_many_pixels", f"the image is {image.size[0]} x {image.size[1]}, over {max_pixels} pixels"
                )
            if data.startswith(b"\xff\xd8") and data.count(START_OF_SCAN) > MAX_SCANS:
                raise BadImage("bad_image", f"the JPEG has over {MAX_SCANS} scans")
            image.verify()  # checksums up to the end of a PNG, which decoding alone does not ask for
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            return image.copy()
    except BadImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage("too_many_pixels", f"the image is over {max_pixels} pixels") from error
    except Exception as error:  # Pillow lets almost any exception out of a damaged file
        raise BadImage("bad_image", f"the image is no whole {', '.join(FORMATS)} file") from error
