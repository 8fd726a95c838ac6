"""A reward that runs elsewhere: `RemoteReward` asks one or several `rewards.server`s."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, Literal, get_args
from uuid import UUID, uuid4

from PIL.Image import Image
from pydantic import ValidationError

from datamodules.sample import PromptSample
from rewards.base import Reward, RewardBatch, RewardUnavailable, Score
from rewards.models import in_batches
from rewards.remote_servers import NoAnswer, Servers
from rewards.wire import Item, RewardInfo, RewardList, ScoreReply, ScoreRequest, encode_image, to_score

Files = list[tuple[str, tuple[str | None, bytes, str]]]
OnFailure = Literal["skip", "fail"]


class RemoteReward(Reward):
    """Scores images on reward servers, exactly as the reward would here: images travel lossless, numbers unrounded.

    `version`, `needs` and `native_range` are the served reward's, known once loaded. Copies and pickles of it are not
    loaded. May be called from several threads at once. Draws nothing from global random generators.

    Args:
        urls: the servers, such as `http://127.0.0.1:18080`. They take turns; one that cannot be reached is left out
            until `cooldown` is over.
        reward: the reward's name in the servers' configuration.
        timeout: how long one request may wait for its answer, in seconds.
        retries: how often a request is sent again after a lost connection, a timeout, or status 502, 503 or 504.
        on_failure: what is done about a request that stays without an answer: `fail` raises RewardUnavailable, so that
            training saves a checkpoint and stops; `skip` makes its images invalid, so that training goes on without.
        max_items: most images of one request; fewer where the server takes fewer.
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
        self.urls = [url.rstrip("/") for url in ([urls] if isinstance(urls, str) else urls)]
        if not self.urls or not all(url.startswith(("http://", "https://")) for url in self.urls):
            raise ValueError(f"RemoteReward has urls={urls!r}, give at least one, such as http://127.0.0.1:18080.")
        if on_failure not in get_args(OnFailure):
            raise ValueError(f"RemoteReward has on_failure={on_failure!r}, use skip or fail.")
        if not timeout > 0:
            raise ValueError(f"RemoteReward has timeout={timeout}, use more than 0 seconds.")
        for key, value, least in (
            ("max_items", max_items, 1),
            ("concurrency", concurrency, 1),
            ("retries", retries, 0),
            ("backoff", backoff, 0),
            ("cooldown", cooldown, 0),
        ):
            if not value >= least:
                raise ValueError(f"RemoteReward has {key}={value}, use {least} or more.")
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
        self._servers: Servers | None = None
        self._loading = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Connections and locks stay here."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_servers", "_loading")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _servers=None, _loading=threading.Lock())

    @property
    def version(self) -> str:
        """The served reward's version; asks the server if that was not done yet."""
        self.load()
        return self._version

    def load(self) -> None:
        """Asks the servers what they serve.

        Raises:
            ValueError: if none can be reached, one refuses, has no such reward, or has another version of it.
        """
        with self._loading:
            if self._servers is not None:
                return
            servers = Servers(
                self.urls,
                timeout=self.timeout,
                retries=self.retries,
                backoff=self.backoff,
                cooldown=self.cooldown,
                token=os.environ.get(self.token_env) or None,
                token_env=self.token_env,
            )
            try:
                listings = {url: _listing(url, body) for url, body in servers.get("/v1/rewards").items()}
                infos = {url: self._find(url, listing) for url, listing in listings.items()}
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

    def _find(self, url: str, listing: RewardList) -> RewardInfo:
        for info in listing.rewards:
            if info.name == self.reward:
                return info
        known = ", ".join(sorted(info.name for info in listing.rewards))
        raise ValueError(f"{url} has no reward {self.reward!r}: it has {known}.")

    def __call__(self, batch: RewardBatch) -> list[Score]:
        """Score B images.

        Raises:
            RewardUnavailable: if a request stays without an answer and `on_failure` is `fail`, and always if a server
                changed its version.
            ValueError: if a server refuses a request as wrong.
        """
        self.load()
        requests = list(in_batches(list(zip(batch.samples, batch.images, strict=True)), self.max_items))
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

    def _score(self, pairs: Sequence[tuple[PromptSample, Image]], given_up: threading.Event) -> list[Score]:
        """The scores of one request's images."""
        assert self._servers is not None
        name = uuid4()
        try:
            url, body = self._servers.post("/v1/score", self._write(name, pairs), given_up)
            reply = self._read(url, body, name, len(pairs))
        except NoAnswer as error:
            reason = f"no scores from reward {self.reward!r}: {error}"
            if self.on_failure == "skip":
                return [Score.invalid(reason) for _ in pairs]
            raise RewardUnavailable(f"{reason}.") from error
        if reply.reward_version != self._version:
            raise RewardUnavailable(
                f"{url} now serves {reply.reward_version!r} as reward {self.reward!r}, but this run was scored by "
                f"{self._version!r}: their scores must not mix, so start the server as it was."
            )
        return [to_score(result) for result in reply.results]

    def _write(self, name: UUID, pairs: Sequence[tuple[PromptSample, Image]]) -> Files:
        """The multipart body's parts. A picture that several items share, such as an edit's source, is sent once."""
        parts: dict[int, str] = {}
        files: Files = []

        def part(image: Image) -> str:
            if id(image) not in parts:
                parts[id(image)] = f"img{len(parts)}"
                files.append((parts[id(image)], (f"{parts[id(image)]}.png", encode_image(image), "image/png")))
            return parts[id(image)]

        items = []
        for sample, image in pairs:
            try:
                item = Item(
                    prompt=sample.prompt,
                    images=[part(image)],
                    source=[] if sample.image is None else [part(sample.image)],
                    metadata=sample.metadata,
                    tag=sample.tag,
                    id=sample.id,
                )
            except ValidationError as error:
                problem = error.errors(include_url=False)[0]
                where = ".".join(map(str, problem["loc"]))
                raise ValueError(f"the prompt {sample.id!r} cannot be sent: {where}: {problem['msg']}.") from error
            items.append(item)
        num_bytes = sum(len(data) for _, (_, data, _) in files)
        if num_bytes > self._max_bytes:
            raise ValueError(
                f"{len(pairs)} images for reward {self.reward!r} are {num_bytes} bytes, but its server takes requests "
                f"of at most {self._max_bytes}: lower `max_items`, or raise the server's max_request_bytes."
            )
        request = ScoreRequest(schema=1, id=name, reward=self.reward, items=items)
        return [("request", (None, request.model_dump_json(by_alias=True).encode(), "application/json")), *files]

    def _read(self, url: str, body: bytes, name: UUID, num_items: int) -> ScoreReply:
        try:
            reply = ScoreReply.model_validate_json(body)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, problem["loc"]))
            raise NoAnswer(f"{url} sent a reply that is wrong at {where or 'its JSON'} ({problem['msg']})") from error
        if reply.id != name:
            raise NoAnswer(f"{url} answered request {reply.id} in place of {name}")
        if len(reply.results) != num_items:
            raise NoAnswer(f"{url} sent {len(reply.results)} results for {num_items} images")
        return reply


def _listing(url: str, body: bytes) -> RewardList:
    try:
        return RewardList.model_validate_json(body)
    except ValidationError as error:
        raise ValueError(f"{url} does not answer as a reward server does: check `urls`.") from error
