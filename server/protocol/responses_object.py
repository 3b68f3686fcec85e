"""The response object: what the request said, what came of it, and nothing left out that a client may look for."""

from typing import Any, Literal

from server.errors import ApiError
from server.generation import Usage
from server.protocol.responses_request import ResponsesBody, ResponsesChat

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]


def settings(response_id: str, created: int, model: str, body: ResponsesBody, asked: ResponsesChat) -> dict[str, Any]:
    """A response that has not begun: every field, with the request's settings as they apply."""
    text_format = body.text.get("format") or {"type": "text"}
    return {
        "id": response_id,
        "object": "response",
        "created_at": created,
        "status": "in_progress",
        "background": body.background,
        "completed_at": None,
        "conversation": None,
        "error": None,
        "frequency_penalty": body.frequency_penalty,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": asked.chat.max_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata,
        "model": model,
        "moderation": None,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls,
        "presence_penalty": body.presence_penalty,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "prompt_cache_retention": None,
        "reasoning": {"effort": asked.effort, "summary": body.reasoning.get("summary")},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store,
        "temperature": body.temperature,
        "text": {"format": text_format, "verbosity": body.text.get("verbosity") or "medium"},
        "tool_choice": body.tool_choice or "auto",
        "tools": asked.box.shown,
        "top_logprobs": body.top_logprobs,
        "top_p": body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


def usage_object(usage: Usage) -> dict[str, Any]:
    details: dict[str, Any] = {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0}
    if usage.miss_reason is not None:
        details["cache_miss_reason"] = usage.miss_reason
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": details,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def error_object(error: ApiError) -> dict[str, Any]:
    """`error` of a failed response, in the words that clients know."""
    if error.status == 400:
        code = "invalid_prompt"
    elif error.status == 429:
        code = "rate_limit_exceeded"
    else:
        code = "server_error"
    return {"code": code, "message": error.message}
