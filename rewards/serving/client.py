"""`RemoteReward`: a reward that asks one or several reward servers (`rewards.serving.server`) for its scores."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import uuid4

from PIL.Image import Image
from pydantic import ValidationError

from datamodules.chunks import chunks
from datamodules.sample import PromptSample
from rewards.arguments import OnFailure, check_minimum, check_on_failure, checked_url
from rewards.base import Reward, RewardBatch, RewardUnavailable, Score
from rewards.retries import TransientError
from rewards.serving.protocol import (
    Item,
    RewardInfo,
    RewardList,
    ScoreReply,
    ScoreRequest,
    encode_image,
    item_id,
    to_score,
)
from rewards.serving.server_pool import MAX_REPLY_BYTES, NoAnswer, ServerPool

Pair = tuple[PromptSample, Image]

PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
"""Modes of PIL images that PNG keeps; others are converted to RGB."""
PART_OVERHEAD_BYTES = 256
"""Upper bound of the bytes of a part's headers and boundary."""
REQUEST_OVERHEAD_BYTES = 1024
"""Upper bound of the bytes of a request without its items, its images and the reward's name."""
REPLY_BYTES_PER_ITEM = 64 * 2**10
"""Upper bound of the bytes of one result in a reply."""


class RemoteReward(Reward):
    """Scores images on reward servers, exactly as the reward would here: images travel lossless, numbers unrounded.

    Images of modes that PNG cannot hold (CMYK, F, I and other rare ones) are converted to RGB first, as scorers do.
    In `metadata`, tuples and arrays arrive as lists, and the numbers of numpy as plain numbers.

    `version`, `needs` and `native_range` are the served reward's, known once loaded. Copies and pickles of it are not
    loaded. May be called from several threads at once. Draws nothing from global random generators.

    Args:
        urls: the servers, such as `http://127.0.0.1:18080`. They take turns; one that cannot be reached is left out
            until `cooldown` is over.
        reward: the reward's name in the servers' configuration.
        timeout: how long one attempt may take until the whole answer is there, in seconds.
        retries: how often a request is sent again after a lost connection, a timeout or a bad answer: status 408, 425,
            429 or any but 200 and 4xx; no reply, one to another request, or one whose results are not of its images.
        on_failure: what is done about a request that stays without a good answer, or an image too large for the server:
            `fail` raises RewardUnavailable, so that training saves a checkpoint and stops; `skip` makes its images
            invalid, so that training goes on without.
        max_items: most images of one request; fewer where the server takes fewer, or where they are too many bytes.
        concurrency: most requests of one call under way.
        backoff: pause before the first retry, in seconds, give or take a half; doubles with every retry, up to 30.
        cooldown: how long a server that could not be reached is left out, in seconds.
        token_env: the environment variable with the servers' token; unset is no token.
        name: name in the logs; null is `reward`.
    """

    def __init__(
        self,
        urls: list[str] | str,
        reward: str,
        timeout: float = 60.0,
        retries: int = 3,
        on_failure: OnFailure = "fail",
        max_items: int = 16,
        concurrency: int = 4,
        backoff: float = 0.5,
        cooldown: float = 30.0,
        token_env: str = "REWARD_TOKEN",
        name: str | None = None,
    ) -> None:
        example = "http://127.0.0.1:18080"
        given = [urls] if isinstance(urls, str) else urls
        self.urls = [checked_url("RemoteReward", "urls", url, example, "token_env") for url in given]
        if not self.urls:
            raise ValueError(f"RemoteReward has urls=[], give at least one, such as {example}.")
        check_on_failure("RemoteReward", on_failure)
        if not 0 < timeout < math.inf:
            raise ValueError(f"RemoteReward has timeout={timeout}, use more than 0 seconds.")
        check_minimum("RemoteReward", 1, max_items=max_items, concurrency=concurrency)
        check_minimum("RemoteReward", 0, retries=retries, backoff=backoff, cooldown=cooldown)
        self.reward = reward
        self.timeout = timeout
        self.retries = retries
        self.on_failure: OnFailure = on_failure
        self.max_items = max_items
        self.concurrency = concurrency
        self.backoff = backoff
        self.cooldown = cooldown
        self.token_env = token_env
        self.name = name or reward
        self.needs: tuple[str, ...] = ()
        self.native_range = (-math.inf, math.inf)
        self._version = ""
        self._max_bytes = 0
        self._servers: ServerPool | None = None
        self._loading = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the connections and the lock: copies and pickles are not loaded."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_servers", "_loading")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _servers=None, _loading=threading.Lock())

    @property
    def version(self) -> str:
        """Version of the scores: the served reward's version; asks the server if that was not done yet."""
        self.load()
        return self._version

    def load(self) -> None:
        """Asks the servers for the reward's version, needs, range and limits.

        Raises:
            ValueError: if none can be reached, one refuses, has no such reward, or has another version of it.
        """
        with self._loading:
            if self._servers is not None:
                return
            servers = ServerPool(
                self.urls,
                timeout=self.timeout,
                retries=self.retries,
                backoff=self.backoff,
                cooldown=self.cooldown,
                token=os.environ.get(self.token_env) or None,
                token_env=self.token_env,
            )
            try:
                listings = {url: _parse_listing(url, body) for url, body in servers.get("/v1/rewards").items()}
                infos = {url: self._find_info(url, listing) for url, listing in listings.items()}
                info = next(iter(infos.values()))
                if any(other.version != info.version for other in infos.values()):
                    versions = "; ".join(f"{url}: {other.version}" for url, other in infos.items())
                    raise ValueError(
                        f"the servers of reward {self.reward!r} have different versions ({versions}): their scores are "
                        "not comparable, so give all of them one configuration."
                    )
            except BaseException:
                servers.close()
                raise
            self.max_items = min(self.max_items, *(listing.max_items for listing in listings.values()))
            self._max_bytes = min(listing.max_request_bytes for listing in listings.values())
            low, high = info.native_range
            self.native_range = (-math.inf if low is None else low, math.inf if high is None else high)
            self.needs = tuple(info.needs)
            self._version = info.version
            self._servers = servers

    def _find_info(self, url: str, listing: RewardList) -> RewardInfo:
        for info in listing.rewards:
            if info.name == self.reward:
                return info
        known = ", ".join(sorted(info.name for info in listing.rewards))
        raise ValueError(f"{url} has no reward {self.reward!r}: it has {known}.")

    def __call__(self, batch: RewardBatch) -> list[Score]:
        """Scores B images on the servers, in requests of at most `max_items` images.

        Raises:
            RewardUnavailable: if a request stays without a good answer and `on_failure` is `fail`, and always if a
                server changed its version or refuses a request as wrong.
            ValueError: if a sample holds what cannot be sent.
        """
        self.load()
        pairs = list(zip(batch.samples, batch.images, strict=True))
        requests = [pairs[rows] for rows in chunks(len(pairs), self.max_items)]
        if len(requests) <= 1:
            return [score for request in requests for score in self._score(request, threading.Event())]
        given_up = threading.Event()
        pool = ThreadPoolExecutor(min(self.concurrency, len(requests)), thread_name_prefix="remote-reward")
        try:
            futures = [pool.submit(self._score, request, given_up) for request in requests]
            wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future.done():
                    future.result()  # raises the first error, while other requests may still come again and again
            return [score for future in futures for score in future.result()]
        finally:
            given_up.set()  # after an error the others need not come again
            pool.shutdown(cancel_futures=True)

    def _score(self, pairs: Sequence[Pair], given_up: threading.Event) -> list[Score]:
        """Scores up to `max_items` images, in one request where the server takes that many bytes."""
        scores: list[Score] = []
        for draft in self._drafts(pairs):
            if given_up.is_set():
                break  # the call has failed: nobody reads these scores
            try:
                scores += self._send(draft, given_up)
            except NoAnswer as error:
                reason = f"no scores from reward {self.reward!r}: {error}"
                if self.on_failure == "fail":
                    raise RewardUnavailable(f"{reason}.") from error
                scores += [Score.invalid(reason) for _ in draft.items]
        return scores

    def _drafts(self, pairs: Sequence[Pair]) -> Iterator[_RequestDraft]:
        """Splits the pairs, in their order, into requests within the servers' `max_request_bytes` if they can be."""
        pngs: dict[int, bytes] = {}  # a source is encoded once, even if several requests need it
        draft = _RequestDraft()
        for pair in pairs:
            longer = draft.with_pair(pair, pngs)
            if draft.items and self._num_bytes(longer) > self._max_bytes:
                yield draft
                longer = _RequestDraft().with_pair(pair, pngs)
            draft = longer
        yield draft

    def _num_bytes(self, draft: _RequestDraft) -> int:
        return REQUEST_OVERHEAD_BYTES + len(self.reward.encode()) + draft.num_bytes

    def _send(self, draft: _RequestDraft, given_up: threading.Event) -> list[Score]:
        """Sends one request; returns the scores of its images."""
        assert self._servers is not None
        num_bytes, num_items = self._num_bytes(draft), len(draft.items)
        if num_bytes > self._max_bytes:
            raise NoAnswer(
                f"the image of prompt {draft.items[0].id!r} alone needs a request of {num_bytes} bytes, but the server "
                f"takes at most {self._max_bytes}: raise its max_request_bytes"
            )
        request = ScoreRequest(schema=1, id=uuid4(), reward=self.reward, items=draft.items)
        parts = dict(draft.files.values())
        ids = [
            item_id(place, item, parts[item.images[0]], parts[item.source[0]] if item.source else None)
            for place, item in enumerate(draft.items)
        ]
        files = [
            ("request", (None, request.model_dump_json(by_alias=True).encode(), "application/json")),
            *((name, (f"{name}.png", data, "image/png")) for name, data in parts.items()),
        ]
        max_reply = max(MAX_REPLY_BYTES, REPLY_BYTES_PER_ITEM * num_items)
        read = partial(_parse_reply, request=request, ids=ids)
        url, reply = self._servers.post("/v1/score", files, given_up, read, max_reply)
        if reply.reward_version != self._version:
            raise RewardUnavailable(
                f"{url} now serves {reply.reward_version!r} as reward {self.reward!r}, but this run was scored by "
                f"{self._version!r}: their scores must not mix, so start the server as it was."
            )
        by_id = {result.item: result for result in reply.results}
        return [to_score(by_id[one]) for one in ids]


@dataclass(frozen=True)
class _RequestDraft:
    """Items of a request and their images: id(image) -> (part, PNG); `num_bytes` is an upper bound of their size."""

    items: list[Item] = field(default_factory=list)
    files: dict[int, tuple[str, bytes]] = field(default_factory=dict)
    num_bytes: int = 0

    def with_pair(self, pair: Pair, pngs: dict[int, bytes]) -> _RequestDraft:
        """Returns a draft with one more item. An image that several items share, such as a source, is sent once.

        Args:
            pair: the sample and the image to add.
            pngs: cache of encoded images, id(image) -> PNG; grows.
        """
        sample, image = pair
        files = dict(self.files)
        num_bytes = self.num_bytes
        for one in (image, sample.image):
            if one is None or id(one) in files:
                continue
            if id(one) not in pngs:
                pngs[id(one)] = encode_image(one if one.mode in PNG_MODES else one.convert("RGB"))
            files[id(one)] = (f"img{len(files)}", pngs[id(one)])
            num_bytes += len(pngs[id(one)]) + PART_OVERHEAD_BYTES
        try:
            item = Item(
                prompt=sample.prompt,
                images=[files[id(image)][0]],
                source=[] if sample.image is None else [files[id(sample.image)][0]],
                metadata=_to_plain(sample.metadata),
                tag=sample.tag,
                id=sample.id,
            )
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            where = ".".join(map(str, problem["loc"]))
            raise ValueError(f"the prompt {sample.id!r} cannot be sent: {where}: {problem['msg']}.") from error
        return _RequestDraft([*self.items, item], files, num_bytes + len(item.model_dump_json().encode()) + 1)


def _to_plain(value: Any) -> Any:
    """Copies a value with lists for tuples and plain numbers for numpy's; `Item` refuses what JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_plain(item) for item in value]
    if callable(getattr(value, "tolist", None)):  # arrays, tensors and their scalars
        return value.tolist()
    return value


def _parse_reply(url: str, body: bytes, request: ScoreRequest, ids: Sequence[str]) -> ScoreReply:
    """Parses the reply to a request whose items have these ids.

    Raises:
        TransientError: if the body is no reply to this request, with one result for each of its items.
    """
    try:
        reply = ScoreReply.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise TransientError(f"{url} sent a reply that is wrong at {where or 'its JSON'} ({problem['msg']})") from error
    if reply.id != request.id:
        raise TransientError(f"{url} answered request {reply.id} in place of {request.id}")
    if len(reply.results) != len(ids):
        raise TransientError(f"{url} sent {len(reply.results)} results for {len(ids)} images")
    given = [result.item for result in reply.results]
    if sorted(given) != sorted(ids):
        odd = next(one for one in given if one not in ids or given.count(one) > 1)
        raise TransientError(f"{url} sent results of other images, or one twice: the first is {odd[:80]!r}")
    return reply


def _parse_listing(url: str, body: bytes) -> RewardList:
    try:
        return RewardList.model_validate_json(body)
    except ValidationError as error:
        if any(problem["loc"] == ("schema",) for problem in error.errors(include_url=False)):
            raise ValueError(
                f"{url} is a reward server of another version, and this one needs results that say which image they "
                "are of: start it from the same version as the training."
            ) from error
        raise ValueError(f"{url} does not answer as a reward server does: check `urls`.") from error
