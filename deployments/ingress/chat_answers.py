"""Plan what a chat's answer may hold beside text: what its template is told, how it is parsed."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from deployments.ingress.api.openai import ChatCompletionRequest
from deployments.ingress.choice import Choice
from deployments.ingress.http_errors import ApiError, invalid
from deployments.ingress.parsed_choice import ParsedChoice
from deployments.ingress.structured.calls import CallableTool, ForcedCalls
from deployments.ingress.structured.constraint import Constraint, Framed
from deployments.ingress.structured.thought import Thought
from deployments.text.answer_syntax import AnswerSyntax, Parser
from deployments.text.vocabulary import Vocabulary
from engine.messages import RequestOutput

SHORT_ID = 9  # characters; some templates take no others

MakeChoice = Callable[[int, RequestOutput | None], Choice]


@dataclass(frozen=True, slots=True)
class ChatAnswers:
    """A request, and what its model's answers look like."""

    request: ChatCompletionRequest
    syntax: AnswerSyntax

    def check(self) -> None:
        """Refuse what this model cannot do. Raises ApiError."""
        request, tools = self.request, self.syntax.tools
        if tools.form is None:
            if request.callable_tools:
                raise _no_tools("tools", tools.refusal)
            for at, message in enumerate(request.messages):
                if message.uses_tools:
                    raise _no_tools(f"messages[{at}]", tools.refusal)
        if request.callable_tools and request.constraint is not None:
            self._check_both(request.constraint)

    def _check_both(self, constraint: Constraint) -> None:
        """Refuse what excludes calls, unless the answer can be told from them."""
        if self.request.has_forced_call:
            reason = "a forced tool_choice, after which there is no other answer"
        elif constraint.kind != "json":
            reason = "tools, from whose calls only JSON can be told"
        elif not self.syntax.marks_calls:
            reason = "tools, whose calls are JSON without marks with this model"
        else:
            return
        message = f"{constraint.path}: not allowed together with {reason}: send tool_choice 'none' "
        raise invalid(
            message + "where the answer must match.", constraint.path, "unsupported_field"
        )

    def messages(self) -> list[dict[str, Any]]:
        fills_content = self.syntax.style.fills_content
        return [message.document(fills_content) for message in self.request.messages]

    def variables(self, own_source: str | None = None) -> dict[str, Any]:
        """List what the template is told beside the messages. Raises ApiError.

        `own_source`: the template, if it is not the base's.
        """
        tools = [tool.document() for tool in self.request.callable_tools]
        given = self.request.chat_template_kwargs or {}
        more = {"tools": tools} if tools else {}
        return {**self._effort(), **given, **more, **self._documents(own_source)}

    def _documents(self, own_source: str | None) -> Mapping[str, Any]:
        documents, reads = self.request.documents, self.syntax.takes_documents
        if not documents:
            return {}
        if not (reads if own_source is None else "documents" in own_source):
            raise invalid(
                "documents: this chat template does not read them: put them into a message.",
                "documents",
                "unsupported_field",
            )
        return {"documents": documents}

    def _effort(self) -> Mapping[str, Any]:
        effort, syntax = self.request.reasoning_effort, self.syntax
        if effort is None:
            return {}
        if syntax.takes_effort:
            return {"reasoning_effort": effort}
        if effort == "none" and syntax.takes_thinking:
            return {"enable_thinking": False}
        if effort == "none" and syntax.think_tags is None:
            return {}
        raise invalid(
            f"reasoning_effort: {effort!r} would do nothing: this model's chat template does not "
            "read it.",
            "reasoning_effort",
            "unsupported_field",
        )

    def constraint(self, prompt: str) -> Constraint | None:
        """Find what answers to a prompt must match: what the request says, or calls."""
        request, thought = self.request, self._thought(prompt)
        if request.has_forced_call:
            return Constraint("calls", self._calls(thought), "tool_choice")
        answer = request.constraint
        if answer is None or not self._is_framed(answer, thought):
            return answer
        calls = self._calls(thought) if request.callable_tools else None
        return Constraint("framed", Framed(answer, thought, calls), answer.path)

    def _calls(self, thought: Thought) -> ForcedCalls:
        request, tools = self.request, self.syntax.tools
        assert tools.form is not None, "it was checked"
        return ForcedCalls(
            tools.form,
            [CallableTool(tool.name, tool.schema, tool.path) for tool in request.allowed_tools],
            self.names_call or request.parallel_tool_calls is False or tools.has_one_call,
            thought,
        )

    def _thought(self, prompt: str) -> Thought:
        """Find how answers to a prompt may begin."""
        syntax, form = self.syntax, self.syntax.tools.form
        continues = self.request.continue_final_message is True
        return Thought(
            syntax.think_tags,
            self._begins_inside(prompt),
            not continues and not syntax.has_reasoned(prompt),
            form is not None and form.has_channels,
            syntax.mark_ids,
        )

    def _is_framed(self, answer: Constraint, thought: Thought) -> bool:
        """Tell whether an answer of a grammar may be something else, too.

        A grammar in which the reasoning's end is written is one of the whole answer.
        """
        if self.request.callable_tools:
            return True
        tags = self.syntax.think_tags
        has_end = tags is not None and answer.kind != "json" and tags.closing in str(answer.value)
        return thought.is_possible and not has_end

    @property
    def names_call(self) -> bool:
        choice = self.request.tool_choice
        return choice is not None and choice.is_named

    def texts(self) -> Iterator[str]:
        """List the texts that the messages are made of."""
        for message in self.request.messages:
            yield message.content or ""
            yield from message.arguments

    def choice_maker(
        self, text: str, vocabulary: Vocabulary, prompt: list[int]
    ) -> MakeChoice | None:
        """Make what parses answers to a prompt, whose text this is. None if they are text alone.

        So is an answer of a grammar that leaves no room for reasoning and calls.
        """
        request, syntax = self.request, self.syntax
        answer = request.constraint
        if answer is not None and not self._is_framed(answer, self._thought(text)):
            return None
        make_parser = self._parser_maker(text)
        if make_parser is None:
            return None
        skip = request.skip_special_tokens is not False

        def make_choice(index: int, output: RequestOutput | None) -> Choice:
            return ParsedChoice(
                index,
                vocabulary.detokenizer(skip, prompt, syntax.shown_ids),
                make_parser(),
                request.stop or (),
                bool(request.include_stop_str_in_output),
                request.min_tokens or 0,
            )

        return make_choice

    def _parser_maker(self, prompt: str) -> Callable[[], Parser] | None:
        request, syntax = self.request, self.syntax
        schemas = {tool.name: tool.schema for tool in request.callable_tools}
        if not schemas and syntax.is_plain:
            return None
        is_inside = self._begins_inside(prompt)
        one_call = request.parallel_tool_calls is False
        no_text = request.constraint is not None
        return lambda: syntax.parser(schemas, is_inside, one_call, no_text)

    def _begins_inside(self, prompt: str) -> bool:
        """Tell whether answers to a prompt begin with reasoning that it has opened."""
        continues = self.request.continue_final_message is True
        continued = (self.request.messages[-1].content or "") if continues else None
        return self.syntax.begins_inside(prompt, continued)

    def call_id_maker(self, new_id: Callable[[], str]) -> Callable[[], str]:
        """Choose how calls are named, such that the template takes the names back."""
        if self.syntax.style.has_short_ids:
            return lambda: new_id()[:SHORT_ID].rjust(SHORT_ID, "0")
        return lambda: f"call_{new_id()}"


def _no_tools(path: str, refusal: str) -> ApiError:
    message = f"{path}: this model cannot be used with tools: {refusal}."
    return invalid(message, path, "unsupported_field")
