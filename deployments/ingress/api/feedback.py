"""Requests and answers of /v1/feedback."""

from pydantic import BaseModel, Field, model_validator

from deployments.ingress.api.openai_fields import Model
from deployments.ingress.feedback import MAX_COMMENT


class FeedbackRequest(Model):
    """A score for one answer: from -1 to 1, or 0 and 1. What is at most 0 counts as bad."""

    request_id: str | None = Field(None, min_length=1, max_length=256)
    id: str | None = Field(None, min_length=1, max_length=256)
    score: float = Field(ge=-1, le=1, allow_inf_nan=False)
    comment: str | None = Field(None, max_length=MAX_COMMENT)

    @model_validator(mode="after")
    def _one_id(self) -> "FeedbackRequest":
        if (self.request_id is None) == (self.id is None):
            raise ValueError("id: one of id and request_id must be given")
        return self

    @property
    def answer_id(self) -> str:
        return self.id or self.request_id or ""


class FeedbackAnswer(BaseModel):
    """`counted` is false for an answer that has a score already."""

    id: str
    counted: bool
