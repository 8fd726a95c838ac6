"""`Judge`: base of the rewards that ask a vision-language model behind an OpenAI-compatible endpoint for ratings."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
from PIL import Image

from datamodules.atomic_write import write_atomically
from datamodules.jsonl import read_json
from datamodules.local_path import local_path
from datamodules.parsing import parse_json
from rewards.arguments import OnFailure, check_minimum, check_on_failure, checked_url
from rewards.base import Reward, RewardUnavailable, Score
from rewards.format import after_thinking
from rewards.judges.templates import JudgeTemplate
from rewards.retries import TransientError, parse_retry_after, retrying

_TRANSIENT = (408, 429, 500, 502, 503, 504)
_THIS_IMAGE = (400, 413, 422)  # refusals that say nothing about other images
_MAX_WAIT = 60.0  # seconds; a server that asks for more is as good as down


@dataclass(frozen=True)
class Question:
    """One request to the judge: a template, the prompt that fills it, and the images to look at."""

    template: JudgeTemplate
    prompt: str
    images: Sequence[Image.Image]


@dataclass(frozen=True)
class Answer:
    """A judge's answer to a question.

    Args:
        ratings: as many as the template asks for; empty if there are none.
        reply: the judge's words; None if the ratings come from the cache.
        reason: why there are no ratings.
    """

    ratings: tuple[float, ...] = ()
    reply: str | None = None
    reason: str = ""

    @property
    def detail(self) -> dict[str, Any]:
        """Entries for `Score.detail`: the reply, or `cached: true` for ratings from the cache."""
        return {"cached": True} if self.reply is None else {"reply": self.reply}


class Judge(Reward):
    """Base of the rewards that ask a vision-language model for ratings; a subclass says what it asks.

    A reply that the template cannot read is asked for once more, then its image is invalid. So is one whose own request
    is refused (400, 413, 422: a content policy, a prompt too long). Other refusals (401, 403, 404, further 4xx) raise
    at once whatever `on_failure` says: a wrong key or a wrong model name fails for every image.

    Args:
        base_url: address of the API, up to and with its version: `http://127.0.0.1:8000/v1`.
        model: the name that the endpoint knows the judge by.
        api_key_env: name of the environment variable that holds the key (never the key itself); null sends none.
        name: key of this reward in logs; null is the default one.
        image_size: images are resized to this many pixels square, as UnifiedReward's 512; null sends them as they are.
        max_tokens: longest reply, in tokens.
        concurrency: most requests at any time.
        timeout: seconds without a byte from the server after which a request has failed.
        max_retries: further attempts after timeouts, lost connections, broken replies and 408, 429, 500, 502, 503, 504.
        backoff: seconds before the first retry, doubled at each further one; the server's Retry-After goes first.
        on_failure: once the retries are used up, `skip` makes the image's score invalid, `fail` raises
            RewardUnavailable.
        cache_dir: folder of the cache of ratings, which several processes may share; null keeps it in memory.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key_env: str | None = None,
        name: str | None = None,
        image_size: int | None = 512,
        max_tokens: int = 1024,
        concurrency: int = 8,
        timeout: float = 120.0,
        max_retries: int = 3,
        backoff: float = 0.5,
        on_failure: OnFailure = "fail",
        cache_dir: str | None = None,
    ) -> None:
        own = type(self).__name__
        if api_key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", api_key_env):
            # not quoted: it may well be the key
            raise ValueError(
                f"{own}'s api_key_env must be the name, in capitals, of an environment variable that holds the key, "
                "such as OPENAI_API_KEY: never write the key itself into a configuration."
            )
        check_on_failure(own, on_failure)
        check_minimum(own, 1, max_tokens=max_tokens, concurrency=concurrency, image_size=image_size)
        check_minimum(own, 0, max_retries=max_retries, backoff=backoff)
        if not 0 < timeout < math.inf:
            raise ValueError(f"{own} has timeout={timeout}, use a number of seconds above 0.")
        self.base_url = checked_url(own, "base_url", base_url, "http://127.0.0.1:8000/v1", "api_key_env")
        self.model = model
        self.api_key_env = api_key_env
        if name is not None:
            self.name = name
        self.image_size = image_size
        self.max_tokens = max_tokens
        self.concurrency = concurrency
        self.timeout = timeout
        self.max_retries = max_retries
        self.backoff = backoff
        self.on_failure: OnFailure = on_failure
        self.cache_dir = local_path(cache_dir, f"{own}'s cache_dir") if cache_dir else None
        self._client: httpx.Client | None = None
        self._key = ""
        self._cache: dict[str, tuple[float, ...]] = {}

    def load(self) -> None:
        """Reads the key and opens the client; sends nothing."""
        if self._client is not None:
            return
        headers = {}
        if self.api_key_env is not None:
            self._key = os.environ.get(self.api_key_env, "").strip()
            if not self._key:
                raise ValueError(
                    f"{type(self).__name__} needs the key of {self.base_url} in the environment variable "
                    f"{self.api_key_env}, which is not set: export it, or set api_key_env to null for a server that "
                    "asks for none."
                )
            if not re.fullmatch(r"[!-~]+", self._key):  # the HTTP library would quote it in its error
                raise ValueError(f"{self.api_key_env} holds white space or letters that no key has: copy the key anew.")
            headers["Authorization"] = f"Bearer {self._key}"
        if self.cache_dir is not None:
            self.cache_dir.mkdir(parents=True, exist_ok=True)
        limits = httpx.Limits(max_connections=self.concurrency)
        self._client = httpx.Client(headers=headers, timeout=self.timeout, limits=limits)

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Asks Q questions, `concurrency` at a time and equal ones once; returns Q answers in their order."""
        self.load()
        answers: dict[str, Answer] = {}
        unknown: dict[str, Question] = {}
        keys: list[str] = []
        for question in questions:
            prepared = Question(question.template, question.prompt, [self._prepare(image) for image in question.images])
            key = self._digest(prepared)
            keys.append(key)
            ratings = self._read_cache(key)
            if ratings is not None:
                answers[key] = Answer(ratings)
            else:
                unknown[key] = prepared
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            answers.update(pool.map(lambda item: (item[0], self._judge(*item)), unknown.items()))
        finally:  # after an error the questions still waiting are not asked
            pool.shutdown(cancel_futures=True)
        return [answers[key] for key in keys]

    def _score_each(
        self, num_images: int, questions: Mapping[int, Question], to_score: Callable[[Answer], Score]
    ) -> list[Score]:
        """Asks at most one question per image and converts the ratings.

        Args:
            num_images: number of images, B.
            questions: row of the image -> its question; images without one lack their source and are invalid.
            to_score: converts an answer that has ratings.

        Returns:
            B scores.
        """
        scores = [self._no_source()] * num_images
        for row, answer in zip(questions, self.ask(list(questions.values())), strict=True):
            scores[row] = to_score(answer) if answer.ratings else Score.invalid(answer.reason)
        return scores

    def _no_source(self) -> Score:
        return Score.invalid(f"{self.name} compares with a source image, and the sample has none")

    def _prepare(self, image: Image.Image) -> Image.Image:
        image = image.convert("RGB")
        size = self._resized(image.size)
        return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height, in pixels, in which an image of `size` is sent."""
        return (self.image_size, self.image_size) if self.image_size else size

    def _digest(self, question: Question) -> str:
        template, sizes = question.template, [image.size for image in question.images]
        digest = hashlib.sha256(json.dumps([self.model, template.id, template.text, question.prompt, *sizes]).encode())
        for image in question.images:
            digest.update(image.tobytes())
        return digest.hexdigest()

    def _read_cache(self, key: str) -> tuple[float, ...] | None:
        if self.cache_dir is None:
            return self._cache.get(key)
        path = self.cache_dir / f"{key}.json"
        if not path.is_file():
            return None
        native = read_json(path)["native"]
        return tuple(map(float, native)) if isinstance(native, list) else (float(native),)

    def _write_cache(self, key: str, template: str, answer: Answer) -> None:
        if self.cache_dir is None:
            self._cache[key] = answer.ratings
            return
        native = answer.ratings[0] if len(answer.ratings) == 1 else answer.ratings
        entry = {"native": native, "model": self.model, "template": template, "reply": answer.reply}
        write_atomically(self.cache_dir / f"{key}.json", json.dumps(entry))  # others may write the same ratings

    def _judge(self, key: str, question: Question) -> Answer:
        template = question.template
        body = {
            "model": self.model,
            "temperature": 0,
            "max_tokens": self.max_tokens,
            "messages": [
                {
                    "role": "user",
                    "content": [
                        *({"type": "image_url", "image_url": {"url": _data_url(image)}} for image in question.images),
                        {"type": "text", "text": template.text.replace("{prompt}", question.prompt)},
                    ],
                }
            ],
        }
        reason = reply = ""
        for _ in range(2):  # once more if the reply cannot be read: servers are not deterministic at temperature 0
            try:
                reply, finish = retrying(self.max_retries, self.backoff, _MAX_WAIT)(self._ask, body)
            except TransientError as error:
                reason = f"{self._endpoint} failed {self.max_retries + 1} times, last with {error}"
                if self.on_failure == "fail":
                    raise RewardUnavailable(f"{reason}: start or unburden it, or set on_failure to skip.") from error
                return Answer(reason=reason)
            except _ImageRefused as error:
                return Answer(reason=str(error))
            try:
                answer = Answer(template.read(after_thinking(reply), template.low, template.high), reply)
            except ValueError as error:
                cut = f", cut off at max_tokens={self.max_tokens}" if finish == "length" else ""
                reason = f"{error}{cut}; the reply ends: {reply[-200:]}"
                continue
            self._write_cache(key, template.id, answer)
            return answer
        return Answer(reason=reason)

    def _ask(self, body: dict[str, Any]) -> tuple[str, str]:
        """Sends one request; returns the reply's text and its finish reason.

        Raises:
            TransientError: if there is no answer, or one that says to come again.
            _ImageRefused: if the server does not take this request.
            RewardUnavailable: if it takes none.
        """
        assert self._client is not None
        try:
            response = self._client.post(self._endpoint, json=body)
        except httpx.RequestError as error:  # timeouts among them
            raise TransientError(f"{type(error).__name__} {error}".strip()) from error
        status = response.status_code
        # servers quote the key back in "incorrect key" messages
        text = response.text.replace(self._key, "***") if self._key else response.text
        if status in _TRANSIENT:
            pause = parse_retry_after(response.headers.get("retry-after"), _MAX_WAIT)
            raise TransientError(f"{status} {_short(text)}", pause)
        if status != 200:
            kind = _ImageRefused if status in _THIS_IMAGE else RewardUnavailable
            raise kind(f"{self._endpoint} refused with {status} ({_short(text)}): {self._advice(response)}")
        reply = _read_reply(text)
        if reply is None:
            raise TransientError(f"200 with no chat completion: {_short(text)}")
        return reply

    @property
    def _endpoint(self) -> str:
        return f"{self.base_url}/chat/completions"

    def _advice(self, response: httpx.Response) -> str:
        if response.status_code in (401, 403):
            return f"check the key in {self.api_key_env}." if self.api_key_env else "set api_key_env to its key's name."
        if response.status_code in (404, 405) or response.is_redirect:
            return f"check base_url (it ends in /v1 on most servers) and that model {self.model} is served there."
        return f"check that model {self.model} takes this prompt, images and a reply of max_tokens={self.max_tokens}."


class _ImageRefused(Exception):
    """The server refuses this image or its prompt; it may accept others."""


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _read_reply(text: str) -> tuple[str, str] | None:
    """Returns text and finish reason of a chat completion's first choice; None if this is no chat completion."""
    try:
        choice = parse_json(text, "the reply")["choices"][0]
        content = choice["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    # a refusal comes as null: nothing to read, but the server works
    return (content if isinstance(content, str) else ""), str(choice.get("finish_reason"))


def _short(text: str) -> str:
    return " ".join(text.split())[:200] or "no text"
