"""`VLMJudge`: a vision-language model that gives one rating per image, such as UnifiedReward."""

from __future__ import annotations

from typing import Any

from rewards.base import RewardBatch, Score
from rewards.judges.base import Answer, Judge, Question
from rewards.judges.templates import TEMPLATES, JudgeTemplate, read_wording, reworded


class VLMJudge(Judge):
    """Asks a vision-language model for a rating. native = table = the rating, rl = rating / highest rating.

    UnifiedReward is `template: unified_reward_v1` with `CodeGoat24/UnifiedReward-7b-v1.5` served by sglang or vLLM.
    Any other judge, and any other wording, is a *different metric*, even if its ratings run from 1 to 5 too;
    `version` names both. The wording of our templates is our own, so expect an offset to published UnifiedReward
    numbers: `wording` takes the published text where you have it.

    A reply counts if it states one number after `Final Score:`, inside the template's range. Several statements must
    agree, so that a caption which says "Final Score: 5" and is quoted by the judge cannot pass for its rating.
    `rewards.judges.base.Judge` says what becomes of a reply that cannot be read, and of failures.

    Args:
        base_url: address of the API, up to and with its version: `http://127.0.0.1:8000/v1`.
        model: the name that the endpoint knows the judge by.
        template: id of the question: `unified_reward_v1` (1 to 5), `edit_v1` (source and edited image, 1 to 5) or
            `quality_v1` (0 to 10).
        wording: text file that replaces the template's words, with `{prompt}` where the caption goes.
        **kwargs: see `rewards.judges.base.Judge`; the default `name` is the template's (`unified_reward`, `edit_judge`,
            `quality_judge`).
    """

    def __init__(
        self, base_url: str, model: str, template: str = "unified_reward_v1", wording: str | None = None, **kwargs: Any
    ) -> None:
        if template not in TEMPLATES:
            raise ValueError(f"VLMJudge has template={template!r}, use one of {', '.join(TEMPLATES)}.")
        self.template: JudgeTemplate = TEMPLATES[template]
        self.name = self.template.reward
        super().__init__(base_url, model, **kwargs)
        if wording is not None:
            self.template = reworded(self.template, read_wording(wording, "VLMJudge's wording"))
        self.needs = ("image",) if self.template.source else ()
        self.native_range = (self.template.low, self.template.high)

    @property
    def version(self) -> str:
        """Version of the scores: the judge, the wording and the image size."""
        size = f"{self.image_size} px" if self.image_size else "full size"
        return f"{self.template.id} judged by {self.model} at {size}"

    def __call__(self, batch: RewardBatch) -> list[Score]:
        """Scores B images; `detail` holds the judge's reply, or `cached: true` for a rating from the cache."""
        questions: dict[int, Question] = {}
        for row, (sample, image) in enumerate(zip(batch.samples, batch.images, strict=True)):
            if not self.template.source:
                questions[row] = Question(self.template, sample.prompt, [image])
            elif sample.image is not None:
                questions[row] = Question(self.template, sample.prompt, [sample.image, image])
        return self._score_each(len(batch), questions, self._to_score)

    def _to_score(self, answer: Answer) -> Score:
        (rating,) = answer.ratings
        return Score(native=rating, table=rating, rl=rating / self.template.high, detail=answer.detail)
