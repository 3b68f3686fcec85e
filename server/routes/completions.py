"""POST /v1/completions: raw continuation of texts or token ids, and the log probabilities of those."""

import time
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from server.chat_run import after_the_first
from server.completion_prompt import echoed_text, encode_prompts, ends_in_reasoning
from server.errors import ApiError
from server.generation import GenerationEvent, TokenLogprob, Usage
from server.grammar.build import build_format
from server.grammar.formats import output_format_of
from server.middleware import context_of
from server.protocol import sse
from server.protocol.common import usage_counts
from server.protocol.completion_logprobs import Columns, PromptScores, answer_columns, joined
from server.protocol.completions import DEFAULT_TOKENS, CompletionBody, CompletionChunks, completion_answer
from server.routes.call import completion_budget, estimated_tokens, off_loop, read_body, state_of
from server.routes.generate import Job, answer_id, merge, run, total_usage, usage_of_choices
from server.routes.stream import EventStream, until_disconnect
from server.state import Serving
from server.validation import END_OF_REASONING, check_prompt_logprobs, for_answer, sampling_params

router = APIRouter()

Events = AsyncGenerator[GenerationEvent, None]
Merged = AsyncGenerator[tuple[int, GenerationEvent], None]


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    body, num_bytes = await read_body(request, CompletionBody)
    body.check()
    state, context = state_of(request), context_of(request.scope)
    serving = state.serving()
    state.check_model(body.model)
    params = msgspec.structs.replace(
        sampling_params(body, serving, body.logprobs), prompt_logprobs=body.num_prompt_logprobs
    )
    wanted = output_format_of(body)
    share = estimated_tokens(num_bytes) // len(body.prompt) + 1
    # One computes the prompt, the others find it in the cache.
    shares = serving.info.enable_prefix_cache
    sources: list[Events] = []
    with ExitStack() as stack:
        tickets = [
            [
                stack.enter_context(state.admission.enter(context.key_id, share if not n or not shares else 1))
                for n in range(body.n)
            ]
            for _ in body.prompt
        ]
        prompts = await off_loop(num_bytes, lambda: encode_prompts(serving, body))
        check_prompt_logprobs(
            map(len, prompts), params.prompt_logprobs, "logprobs" if body.prompt_logprobs is None else "prompt_logprobs"
        )
        for ids, places in zip(prompts, tickets, strict=True):
            # A score takes a step, and a step ends with a token: it is made and dropped.
            requested = None if body.max_tokens is None else max(1, body.max_tokens)
            max_tokens = completion_budget(
                serving, len(ids), requested, DEFAULT_TOKENS, param="prompt", limit_param="max_tokens"
            )
            choices: list[Events] = []
            for n, ticket in enumerate(places):
                ticket.count(len(ids) if not n or not shares else 1)
                reasoning = ends_in_reasoning(ids, serving.tokenizer)
                sampling = for_answer(params, max_tokens=max_tokens, reasoning=reasoning, choice=n)
                grammar = None
                if wanted is not None:
                    after = serving.tokenizer.required_id(END_OF_REASONING) if reasoning else None
                    grammar = await build_format(serving.grammars, wanted, after=after)
                job = Job(prompt_ids=ids, sampling=sampling, ticket=ticket, parse="raw", grammar=grammar)
                choices.append(run(state, serving, context, body, job))
            sources += after_the_first(choices) if shares or params.prompt_logprobs is not None else choices
        answer = _Answer(serving, body, prompts)
        events = merge([_unsaid(source) for source in sources] if body.max_tokens == 0 else sources)
        if body.stream:
            chunks = CompletionChunks(
                answer_id("cmpl"), int(time.time()), state.model_name, include_usage=body.include_usage
            )
            on_finish = state.config.api_compat == "deepseek"
            return EventStream(_stream(events, chunks, answer, body, on_finish), state, stack.pop_all().close)
        whole = await until_disconnect(request, state, _whole(events, state.model_name, answer))
        return Response(whole, media_type="application/json")


async def _unsaid(events: Events) -> Events:
    """Events without the answer: what they tell of the prompt stays."""
    async with aclosing(events):
        async for event in events:
            usage = None if event.usage is None else msgspec.structs.replace(event.usage, completion_tokens=0)
            yield GenerationEvent(
                finish_reason=None if event.finish_reason is None else "length",
                usage=usage,
                prompt_logprobs=event.prompt_logprobs,
            )


@dataclass(slots=True)
class _Choice:
    """What one answer has got and not said yet."""

    text: str = ""
    rows: list[TokenLogprob] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    usage: Usage | None = None
    num_tokens: int = 0
    begun: bool = False


class _Answer:
    """Collects events of all choices; choice `index` answers prompt `index // n`."""

    def __init__(self, serving: Serving, body: CompletionBody, prompts: list[np.ndarray]) -> None:
        self.choices = [_Choice() for _ in range(len(prompts) * body.n)]
        self._serving = serving
        self._body = body
        self._prompts = prompts
        self._scores: dict[int, PromptScores] = {}
        self._echoed = [echoed_text(serving, body, n, ids) if body.echo else "" for n, ids in enumerate(prompts)]

    def add(self, index: int, event: GenerationEvent) -> _Choice:
        choice = self.choices[index]
        if event.prompt_logprobs is not None:
            prompt = index // self._body.n
            self._scores[prompt] = PromptScores(self._prompts[prompt], event.prompt_logprobs, self._serving.tokenizer)
        choice.text += event.content
        choice.rows += event.logprobs
        choice.token_ids += event.token_ids
        choice.num_tokens += len(event.token_ids)
        if event.finish_reason is not None:
            choice.finish_reason, choice.usage = event.finish_reason, event.usage
        return choice

    @property
    def is_over(self) -> bool:
        return all(choice.finish_reason is not None for choice in self.choices)

    def take(self, index: int) -> dict[str, Any]:
        """The news of a choice in the fields of a chunk; the first ones of an echo begin with the prompt."""
        choice, body, prompt = self.choices[index], self._body, index // self._body.n
        first, choice.begun = not choice.begun, True
        echoed = self._echoed[prompt]
        columns: Columns | None = None
        if body.logprobs is not None:
            as_ids = body.return_tokens_as_token_ids
            if first and body.echo:
                columns = self._scores[prompt].echoed(body.logprobs, as_ids=as_ids)
            columns = joined(columns, answer_columns(choice.rows, as_ids=as_ids, behind=len(echoed)))
        news = {
            "text": echoed + choice.text if first else choice.text,
            "finish_reason": choice.finish_reason,
            "logprobs": columns,
            "token_ids": choice.token_ids if body.return_token_ids else None,
            "prompt_token_ids": self._prompts[prompt].tolist() if body.return_token_ids and first else None,
        }
        choice.text, choice.rows, choice.token_ids = "", [], []
        return news

    def whole(self, index: int) -> dict[str, Any]:
        """One entry of `choices`."""
        news = self.take(index)
        choice = {"index": index, "text": news["text"], "logprobs": news["logprobs"]}
        choice["finish_reason"] = news["finish_reason"]
        if self._body.return_token_ids:
            choice |= {"token_ids": news["token_ids"], "prompt_token_ids": news["prompt_token_ids"]}
        if self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self._scores[index // self._body.n].by_id(self._body.prompt_logprobs)
        return choice

    def usage(self) -> dict[str, Any]:
        """Counts of what there is so far."""
        n = self._body.n
        totals = []
        for prompt, ids in enumerate(self._prompts):
            mine = self.choices[prompt * n : (prompt + 1) * n]
            known = [
                choice.usage
                or Usage(
                    prompt_tokens=len(ids), completion_tokens=choice.num_tokens, reasoning_tokens=0, cached_tokens=0
                )
                for choice in mine
            ]
            totals.append(usage_of_choices(known))
        return usage_counts(totals[0] if len(totals) == 1 else total_usage(totals))


async def _stream(
    events: Merged, chunks: CompletionChunks, answer: _Answer, body: CompletionBody, usage_on_finish: bool
) -> AsyncGenerator[bytes, None]:
    """`usage_on_finish`: DeepSeek's way, without a chunk of its own."""
    try:
        async with aclosing(events):
            async for index, event in events:
                choice = answer.add(index, event)
                first = body.echo and not choice.begun and event.prompt_logprobs is not None
                if choice.text or choice.finish_reason is not None or first:
                    told = body.continuous_usage or (usage_on_finish and answer.is_over)
                    usage = answer.usage() if told else None
                    yield chunks.text(index, **answer.take(index), usage=usage)
            if body.include_usage and not usage_on_finish:
                yield chunks.usage(answer.usage())
            yield sse.DONE
    except ApiError as error:
        yield sse.error_event(error)


async def _whole(events: Merged, model: str, answer: _Answer) -> bytes:
    async with aclosing(events):
        async for index, event in events:
            answer.add(index, event)
    return completion_answer(
        answer_id=answer_id("cmpl"),
        created=int(time.time()),
        model=model,
        choices=[answer.whole(index) for index in range(len(answer.choices))],
        usage=answer.usage(),
    )
