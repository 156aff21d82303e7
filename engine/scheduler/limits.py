"""SchedulerLimits: the size limits of a step, and the test for a request's last token."""

from dataclasses import dataclass

from engine.scheduler.request import FinishReason, Request, SamplingParams
from engine.scheduler.token_rules import TokenRules, token_rules


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    eos_token_ids: tuple[int, ...] = ()
    target_step_s: float | None = None  # with prompts, while somebody decodes; see StepBudget

    def rules(self, sampling: SamplingParams) -> TokenRules:
        return token_rules(
            sampling.end_token_ids(self.eos_token_ids),
            sampling.logit_bias,
            sampling.bad_words,
            sampling.allowed_token_ids,
        )

    def end_of(self, request: Request, token_id: int) -> FinishReason | None:
        """Why the request ends with its newest token, `token_id`; None if it continues."""
        sampling, num_outputs = request.sampling, len(request.output_token_ids)
        if num_outputs >= sampling.min_tokens and token_id in request.rules.end_token_ids:
            return FinishReason.STOP
        num_tokens = len(request.prompt_token_ids) + num_outputs
        if num_outputs >= sampling.max_tokens or num_tokens >= self.max_model_len:
            return FinishReason.LENGTH
        return None

    def is_ending(self, request: Request) -> bool:
        """Whether a pending token is the last one for any value it may have, or none follows."""
        if request.sampling.pooling is not None:
            return request.num_computed_tokens == request.num_prompt_tokens
        pending = request.num_pending_tokens
        return pending > 0 and (
            len(request.output_token_ids) + pending >= request.sampling.max_tokens
            or request.num_tokens + pending >= self.max_model_len
        )

    def must_wait(self, request: Request) -> bool:
        """Whether a pending token must be known before the next one can be scheduled."""
        pending = request.num_pending_tokens
        return pending > 0 and (
            request.sampling.grammar is not None
            or request.rules.needs_output
            or self.is_ending(request)
        )
