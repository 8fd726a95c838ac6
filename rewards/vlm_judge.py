"""A vision-language model as the judge, behind any OpenAI-compatible endpoint (sglang, vLLM, a hosted one)."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import httpx
from PIL import Image

from rewards.base import Reward, RewardBatch, RewardUnavailable, Score
from rewards.judge_templates import TEMPLATES, JudgeTemplate, parse_mark, read_wording

OnFailure = Literal["skip", "fail"]

_TRANSIENT = (408, 429, 500, 502, 503, 504)
_THIS_IMAGE = (400, 413, 422)  # refusals that say nothing about other images
_MAX_WAIT = 60.0  # seconds; a server that asks for more is as good as down


class VLMJudge(Reward):
    """Asks a vision-language model for a mark. native = table = the mark, rl = mark / highest mark.

    UnifiedReward is `template: unified_reward_v1` with `CodeGoat24/UnifiedReward-7b-v1.5` served by sglang or vLLM.
    Any other judge, and any other wording, is a *different metric*, even if its marks run from 1 to 5 too; `version`
    names both. The wording of our templates is our own, so expect an offset to published UnifiedReward numbers:
    `wording` takes the published text where you have it [U].

    A reply counts if it states one number after `Final Score:`, inside the template's range. Several statements must
    agree, so that a caption which says "Final Score: 5" and is quoted by the judge cannot pass for its mark. One that
    cannot be read is asked for once more, then the image is invalid. So is one whose own request is refused (400, 413,
    422: a content policy, a prompt too long). Other refusals (401, 403, 404, further 4xx) raise at once whatever
    `on_failure` says: a wrong key or a wrong model name fails for every image.

    Args:
        base_url: of the API, up to and with its version: `http://127.0.0.1:8000/v1`.
        model: the name that the endpoint knows the judge by.
        template: id of the question: `unified_reward_v1` (1 to 5), `edit_v1` (source and edited image, 1 to 5) or
            `quality_v1` (0 to 10).
        wording: text file that replaces the template's words, with `{prompt}` where the caption goes.
        api_key_env: name of the environment variable that holds the key (never the key itself); null sends none.
        name: key of this reward in logs; null is the template's (`unified_reward`, `edit_judge`, `quality_judge`).
        image_size: images are resized to this many pixels square, as UnifiedReward's 512; null sends them as they are.
        max_tokens: longest reply.
        concurrency: most requests at any time.
        timeout: seconds without a byte from the server after which a request has failed.
        max_retries: further attempts after timeouts, lost connections, broken replies and 408, 429, 500, 502, 503, 504.
        backoff: seconds before the first retry, doubled at each further one; the server's Retry-After goes first.
        on_failure: once the retries are used up, `skip` makes the image's score invalid, `fail` raises
            RewardUnavailable.
        cache_dir: folder of remembered marks, which several processes may share; null remembers in memory.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        template: str = "unified_reward_v1",
        wording: str | None = None,
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
        if template not in TEMPLATES:
            raise ValueError(f"VLMJudge has template={template!r}, use one of {', '.join(TEMPLATES)}.")
        if api_key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", api_key_env):
            # not quoted: it may well be the key
            raise ValueError(
                "VLMJudge's api_key_env must be the name, in capitals, of an environment variable that holds the key, "
                "such as OPENAI_API_KEY: never write the key itself into a configuration."
            )
        if on_failure not in get_args(OnFailure):
            raise ValueError(f"VLMJudge has on_failure={on_failure!r}, use skip or fail.")
        for key, value, least in (
            ("max_tokens", max_tokens, 1),
            ("concurrency", concurrency, 1),
            ("image_size", 1 if image_size is None else image_size, 1),
            ("max_retries", max_retries, 0),
            ("backoff", backoff, 0),
        ):
            if value < least:
                raise ValueError(f"VLMJudge has {key}={value}, use {least} or more.")
        if timeout <= 0:
            raise ValueError(f"VLMJudge has timeout={timeout}, use a number of seconds above 0.")
        self.base_url = _checked_url(base_url)
        self.model = model
        self.template: JudgeTemplate = TEMPLATES[template]
        if wording is not None:
            text = read_wording(wording, "VLMJudge's wording")
            digest = hashlib.sha256(text.encode()).hexdigest()[:8]
            self.template = replace(self.template, id=f"{template}+{digest}", text=text)
        self.api_key_env = api_key_env
        self.name = name or self.template.reward
        self.needs = ("image",) if self.template.source else ()
        self.native_range = (self.template.low, self.template.high)
        self.image_size = image_size
        self.max_tokens = max_tokens
        self.concurrency = concurrency
        self.timeout = timeout
        self.max_retries = max_retries
        self.backoff = backoff
        self.on_failure: OnFailure = on_failure
        self.cache_dir = Path(cache_dir) if cache_dir else None
        self._client: httpx.Client | None = None
        self._key = ""
        self._marks: dict[str, float] = {}

    @property
    def version(self) -> str:
        """The judge, the wording and the image size."""
        size = f"{self.image_size} px" if self.image_size else "full size"
        return f"{self.template.id} judged by {self.model} at {size}"

    def load(self) -> None:
        """Reads the key and opens the client; sends nothing."""
        if self._client is not None:
            return
        headers = {}
        if self.api_key_env is not None:
            self._key = os.environ.get(self.api_key_env, "").strip()
            if not self._key:
                raise ValueError(
                    f"VLMJudge needs the key of {self.base_url} in the environment variable {self.api_key_env}, which "
                    "is not set: export it, or set api_key_env to null for a server that asks for none."
                )
            if not re.fullmatch(r"[!-~]+", self._key):  # the HTTP library would quote it in its error
                raise ValueError(f"{self.api_key_env} holds white space or letters that no key has: copy the key anew.")
            headers["Authorization"] = f"Bearer {self._key}"
        if self.cache_dir is not None:
            self.cache_dir.mkdir(parents=True, exist_ok=True)
        limits = httpx.Limits(max_connections=self.concurrency)
        self._client = httpx.Client(headers=headers, timeout=self.timeout, limits=limits)

    def __call__(self, batch: RewardBatch) -> list[Score]:
        """Score B images; `detail` holds the judge's reply, or `cached: true` for a remembered mark."""
        self.load()
        scores: dict[str, Score] = {}  # key of the question -> its score; equal questions are asked once
        questions: dict[str, tuple[str, list[Image.Image]]] = {}
        keys: list[str | None] = []
        for sample, image in zip(batch.samples, batch.images, strict=True):
            if self.template.source and sample.image is None:
                keys.append(None)
                continue
            shown = [sample.image, image] if self.template.source and sample.image is not None else [image]
            shown = [self._prepare(picture) for picture in shown]
            key = self._digest(sample.prompt, shown)
            keys.append(key)
            mark = self._recall(key)
            if mark is not None:
                scores[key] = self._score(mark, {"cached": True})
            else:
                questions[key] = (sample.prompt, shown)
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            answers = pool.map(lambda item: (item[0], self._judge(item[0], *item[1])), questions.items())
            scores.update(answers)
        finally:  # after an error the questions still waiting are not asked
            pool.shutdown(cancel_futures=True)
        missing = Score.invalid(f"{self.name} compares with a source image, and the sample has none")
        return [missing if key is None else scores[key] for key in keys]

    def _prepare(self, image: Image.Image) -> Image.Image:
        image = image.convert("RGB")
        size = (self.image_size, self.image_size) if self.image_size else image.size
        return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)

    def _score(self, mark: float, detail: dict[str, Any]) -> Score:
        return Score(native=mark, table=mark, rl=mark / self.template.high, detail=detail)

    def _digest(self, prompt: str, images: list[Image.Image]) -> str:
        question = [self.model, self.template.id, self.template.text, prompt, *(image.size for image in images)]
        digest = hashlib.sha256(json.dumps(question).encode())
        for image in images:
            digest.update(image.tobytes())
        return digest.hexdigest()

    def _recall(self, key: str) -> float | None:
        if self.cache_dir is None:
            return self._marks.get(key)
        path = self.cache_dir / f"{key}.json"
        return float(json.loads(path.read_text())["native"]) if path.is_file() else None

    def _remember(self, key: str, mark: float, reply: str) -> None:
        if self.cache_dir is None:
            self._marks[key] = mark
            return
        entry = {"native": mark, "model": self.model, "template": self.template.id, "reply": reply}
        partial = self.cache_dir / f"{key}.{os.getpid()}.partial"  # another process may write the same mark
        partial.write_text(json.dumps(entry))
        partial.replace(self.cache_dir / f"{key}.json")

    def _judge(self, key: str, prompt: str, images: list[Image.Image]) -> Score:
        body = {
            "model": self.model,
            "temperature": 0,
            "max_tokens": self.max_tokens,
            "messages": [
                {
                    "role": "user",
                    "content": [
                        *({"type": "image_url", "image_url": {"url": _data_url(image)}} for image in images),
                        {"type": "text", "text": self.template.text.replace("{prompt}", prompt)},
                    ],
                }
            ],
        }
        reason = reply = ""
        for _ in range(2):  # once more if the reply cannot be read: servers are not deterministic at temperature 0
            try:
                reply, finish = self._ask(body)
            except ConnectionError as error:
                if self.on_failure == "fail":
                    raise RewardUnavailable(f"{error}: start or unburden it, or set on_failure to skip.") from error
                return Score.invalid(str(error))
            except _ImageRefused as error:
                return Score.invalid(str(error))
            try:
                mark = parse_mark(reply, self.template.low, self.template.high)
            except ValueError as error:
                cut = f", cut off at max_tokens={self.max_tokens}" if finish == "length" else ""
                reason = f"{error}{cut}; the reply ends: {reply[-200:]}"
                continue
            self._remember(key, mark, reply)
            return self._score(mark, {"reply": reply})
        return Score.invalid(reason)

    def _ask(self, body: dict[str, Any]) -> tuple[str, str]:
        """The reply's text and why it ended.

        Raises:
            ConnectionError: once the retries are used up.
            _ImageRefused: if the server does not take this request.
            RewardUnavailable: if it takes none.
        """
        assert self._client is not None
        url = f"{self.base_url}/chat/completions"
        problem = ""
        for attempt in range(self.max_retries + 1):
            wait = min(self.backoff * 2**attempt, _MAX_WAIT)
            try:
                response = self._client.post(url, json=body)
            except httpx.RequestError as error:  # timeouts among them
                problem = f"{type(error).__name__} {error}".strip()
            else:
                # servers quote the key back in "incorrect key" messages
                text = response.text.replace(self._key, "***") if self._key else response.text
                if response.status_code == 200:
                    reply = _read_reply(text)
                    if reply is not None:
                        return reply
                    problem = f"200 with no chat completion: {_short(text)}"
                elif response.status_code in _TRANSIENT:
                    problem = f"{response.status_code} {_short(text)}"
                    wait = max(wait, _retry_after(response.headers.get("retry-after")))
                else:
                    kind = _ImageRefused if response.status_code in _THIS_IMAGE else RewardUnavailable
                    raise kind(f"{url} refused with {response.status_code} ({_short(text)}): {self._advice(response)}")
            if attempt < self.max_retries:
                time.sleep(wait)
        raise ConnectionError(f"{url} failed {self.max_retries + 1} times, last with {problem}")

    def _advice(self, response: httpx.Response) -> str:
        if response.status_code in (401, 403):
            return f"check the key in {self.api_key_env}." if self.api_key_env else "set api_key_env to its key's name."
        if response.status_code in (404, 405) or response.is_redirect:
            return f"check base_url (it ends in /v1 on most servers) and that model {self.model} is served there."
        return f"check that model {self.model} takes this prompt, images and a reply of max_tokens={self.max_tokens}."


class _ImageRefused(Exception):
    """The server does not take this image or its prompt; it may take others."""


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 (raises if it is no number)
        good = parts.scheme in ("http", "https") and bool(parts.hostname)
        secret = parts.username is not None or parts.password is not None or bool(parts.query)
    except ValueError:
        good = secret = False
    if secret:  # not quoted: it would end up in logs, as would every later error
        raise ValueError("VLMJudge's base_url holds a user name or a query: give the key by api_key_env instead.")
    if not good:
        raise ValueError(f"VLMJudge has base_url={url!r}, use one such as http://127.0.0.1:8000/v1.")
    return url.rstrip("/")


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _read_reply(text: str) -> tuple[str, str] | None:
    """Text and finish reason of the first choice; None if this is no chat completion."""
    try:
        choice = json.loads(text)["choices"][0]
        content = choice["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    # a refusal comes as null: nothing to read, but the server works
    return (content if isinstance(content, str) else ""), str(choice.get("finish_reason"))


def _retry_after(value: str | None) -> float:
    """Seconds asked for by a Retry-After header, which holds seconds or a date."""
    if not value:
        return 0.0
    try:
        seconds = float(value) if value.strip().isdigit() else _seconds_until(value)
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), _MAX_WAIT)


def _seconds_until(date: str) -> float:
    when = parsedate_to_datetime(date)
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() - datetime.now(UTC).timestamp()


def _short(text: str) -> str:
    return " ".join(text.split())[:200] or "no text"
