"""The scheduler's two opinions: who comes first, and how much memory a request must find before it starts."""

from engine.request import Request

QueueKey = tuple[int, float, int]


def queue_key(request: Request) -> QueueKey:
    """Lower runs first: priority, then arrival. Nobody is bypassed."""
    return (request.priority, request.arrival_time, request.order)


def tokens_to_reserve(request: Request, max_model_len: int) -> int:
    """Tokens whose pages a request reserves when it is admitted: all it may ever have, for nothing is preempted."""
    return min(request.num_prompt_tokens + request.sampling.max_tokens, max_model_len)
