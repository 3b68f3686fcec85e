"""Every opinion of the scheduler, as pure functions of plain data. Time is in predicted seconds, never in tokens.

    due decode rows       all of them, in every step
    what time is left     prompts, in this order: priority, class, tenant with least virtual time, least work left
    but                   a share of it goes to one favoured prompt: a long one, or one that is past its goal

The order keeps short prompts short (shortest remaining work first), the tenant's virtual time keeps one key from
taking everything, and the share keeps a million-token prompt moving (kv-and-scheduling 7.3).
"""

from collections.abc import Iterable
from enum import IntEnum

from engine.config import SchedulingConfig

TTFT_WORK_FACTOR = 3.0
"""A prompt's first token is due after the goal of its class and this many times its own work."""
PRESSED_SHARE = 0.5
"""Of the goal of its class: a prompt with less slack than that is pressed for time."""
SAFE_ERRORS = 3.0
"""Typical errors of a prediction by which a step may be late and still keep the goals of the answers in it."""
UNWATCHED_STEPS = 3.0
"""Length of a step that holds nobody up but a newcomer, in steps."""
LEAST_PREFILL_SHARE = 0.1
"""Of a step's seconds, when the decode rows alone take all of them: prompts go on, slowly, whatever the model says."""
LEAST_CHUNK = 32
"""Rows worth a chunk; and what the first chunk of a step gets even if the model says that they take too long."""
MOST_BEGUN = 8
"""Prompts of one priority and the higher ones that are begun and not finished: each holds a slot and pages."""
MOST_CHUNKS = 32
"""In one step."""
EXPECTED_QUANTILE = 0.5
"""Of the answers of its class and tenant: what a request is expected to answer when its work is weighed."""
UNKNOWN_ANSWER = 256
"""The same while nothing is known; tokens."""
MISPREDICTED = 0.15
"""Relative error of a step's prediction beyond which it is counted."""
PERIODIC_SNAPSHOT_TOKENS = 32_768
"""A cold prompt of more than twice as many tokens leaves a snapshot each time it has computed so many."""
MOST_SHORTAGES = 8
"""Requests that may be found not to fit before a step stops looking for one that does."""


SHORTAGE_STEPS = 16
"""A request that does not fit is looked up again when so many pages are available, and after so many steps anyway."""
HELD_BACK_FACTOR = 1.5
"""A request is not looked up again where its work was this many times what a step has left for it."""
STANDSTILL_SECONDS = 2.0
"""A prompt that has had no rows for so long is not waited for by others that share its prefix."""
MOST_PARKED = 16
"""Requests that are found in one step to share a prefix in flight; each takes a lookup."""


class ServiceClass(IntEnum):
    """How a request is served; lower comes first."""

    INTERACTIVE = 0
    LONG = 1


OrderKey = tuple[int, int, float, float, float, int]


def service_class(num_prompt_tokens: int, config: SchedulingConfig) -> ServiceClass:
    return ServiceClass.LONG if num_prompt_tokens >= config.long_prompt_tokens else ServiceClass.INTERACTIVE


def order_key(
    *, priority: int, service: ServiceClass, tenant_seconds: float, work_seconds: float, arrival: float, order: int
) -> OrderKey:
    """Lower runs first: priority, class, the tenant that has had least, the least work left, arrival."""
    return (priority, service, tenant_seconds, work_seconds, arrival, order)


def step_seconds(
    decoding: Iterable[ServiceClass],
    pressed: bool,
    config: SchedulingConfig,
    *,
    alone: bool = False,
    spread: float = 0.0,
) -> float:
    """How long a step may take: the configured time, and while prompts are pressed for theirs as long as the answers
    that run allow (longer steps are cheaper for each prompt row: every step reads the weights). Never longer than
    that, but for a prompt that is `alone`, with no answer and no other prompt to wait for it: `UNWATCHED_STEPS` steps.

    `spread` is the typical relative error of a prediction: a goal is a promise, so a lengthened step keeps it even if
    it takes `SAFE_ERRORS` errors longer than predicted.
    """
    nobody = max(config.step_seconds, config.interactive_itl_seconds)
    limit = min((config.itl_seconds(service) for service in decoding), default=None)
    if limit is None and alone:
        return UNWATCHED_STEPS * config.step_seconds
    goal = nobody if limit is None else limit
    usual = min(goal, config.step_seconds)
    return max(usual, goal / (1.0 + SAFE_ERRORS * spread)) if pressed else usual


def is_pressed(slack_seconds: float, service: ServiceClass, config: SchedulingConfig) -> bool:
    """Whether a prompt has used up so much of its time that it may come late."""
    return slack_seconds < PRESSED_SHARE * config.ttft_seconds(service)


def long_seconds(prefill: float, gives_first_tokens: bool, config: SchedulingConfig) -> float:
    """What long prompts may take of a step's prompt seconds. Whoever waits for a first token that the step gives to an
    interactive prompt waits for the whole step, so there it is their share and no more.
    """
    return config.long_prefill_share * prefill if gives_first_tokens else prefill


def prefill_seconds(total: float, decode: float) -> float:
    """What the decode rows leave of a step's seconds."""
    return max(total - decode, LEAST_PREFILL_SHARE * total)


def latest_start(arrival: float, service: ServiceClass, work_seconds: float, config: SchedulingConfig) -> float:
    """When a prompt must be begun at the latest, undisturbed, to have its first token in time."""
    return arrival + config.ttft_seconds(service) + (TTFT_WORK_FACTOR - 1.0) * work_seconds


def longest_prefix_wait(service: ServiceClass, work_seconds: float, config: SchedulingConfig) -> float:
    """How long a prompt may wait in all for prefixes that others compute. In an overload waiting is what sheds work,
    so this is far more than its goal; a leader that stands still is left much earlier.
    """
    return config.ttft_seconds(service) + 10.0 * work_seconds


def slack(
    now: float,
    arrival: float,
    service: ServiceClass,
    work_seconds: float,
    left_seconds: float,
    config: SchedulingConfig,
) -> float:
    """Seconds that a prompt with `left_seconds` of its `work_seconds` to go may still lose; negative: it is late."""
    return arrival + config.ttft_seconds(service) + TTFT_WORK_FACTOR * work_seconds - left_seconds - now


def tokens_to_reserve(
    *,
    num_tokens: int,
    num_prompt_tokens: int,
    max_tokens: int,
    expected_output: int | None,
    least_ahead: int,
    max_model_len: int,
) -> int:
    """Tokens whose pages a request must find before it starts.

    `expected_output` is a quantile of what such requests answer; None: all that it may ever have. At least one token
    past those known, `least_ahead` for one that was preempted before, and as many as it has answered.
    """
    most = min(num_prompt_tokens + max_tokens, max_model_len)
    if expected_output is None:
        return most
    ahead = max(least_ahead, num_tokens - num_prompt_tokens) if least_ahead else 1
    return min(most, max(num_tokens + ahead, num_prompt_tokens + expected_output))


def long_share_binds(*, long_pages: int, pages_wanted: int, num_pages: int, config: SchedulingConfig) -> bool:
    """Whether one more long request would take more than the share of long ones. Asked only while shorter ones wait;
    the first long request is always let in.
    """
    return long_pages > 0 and long_pages + pages_wanted > config.long_page_share * num_pages


def credit_is_spent(*, bypassed_seconds: float, own_seconds: float) -> bool:
    """Whether so much work has gone past a request that nothing more may."""
    return bypassed_seconds > own_seconds
