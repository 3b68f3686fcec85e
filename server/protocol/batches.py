"""The Files and Batches APIs: what they take and what they answer."""

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from server.batches.check import ENDPOINTS
from server.batches.files import LONGEST_SECONDS, SHORTEST_SECONDS
from server.errors import bad_request
from server.protocol.common import Body

MOST_METADATA = 16
LONGEST_WINDOW_HOURS = 30 * 24
_HOURS = re.compile(r"([1-9]\d{0,2})h")


def _endpoint(value: str) -> str:
    if value not in ENDPOINTS:
        raise ValueError(f"must be one of {', '.join(ENDPOINTS)}")
    return value


def _window(value: str) -> str:
    match = _HOURS.fullmatch(value)
    if match is None or int(match[1]) > LONGEST_WINDOW_HOURS:
        raise ValueError(f"must be hours such as 24h, {LONGEST_WINDOW_HOURS} at most")
    return value


class ExpiresAfter(BaseModel):
    """When a file is deleted, counted from its creation."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=SHORTEST_SECONDS, le=LONGEST_SECONDS)]


class BatchBody(Body):
    input_file_id: Annotated[str, Field(min_length=1, max_length=128)]
    endpoint: Annotated[str, AfterValidator(_endpoint), Field(json_schema_extra={"enum": list(ENDPOINTS)})]
    completion_window: Annotated[str, AfterValidator(_window), Field(pattern=_HOURS.pattern)] = "24h"
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
            Field(max_length=MOST_METADATA),
        ]
        | None
    ) = None
    output_expires_after: ExpiresAfter | None = None

    @property
    def window_seconds(self) -> int:
        return int(self.completion_window.removesuffix("h")) * 3600

    @property
    def output_seconds(self) -> int:
        return LONGEST_SECONDS if self.output_expires_after is None else self.output_expires_after.seconds


def expiry(fields: dict[str, str]) -> int:
    """Seconds of `expires_after` in a form; OpenAI's clients write it `expires_after[seconds]`.

    Raises:
        ApiError: 400.
    """
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return LONGEST_SECONDS
    if anchor != "created_at":
        raise bad_request("expires_after[anchor] must be created_at.", param="expires_after[anchor]")
    text = seconds or ""
    if not (text.isascii() and text.isdigit() and len(text) < 10) or not (
        SHORTEST_SECONDS <= int(text) <= LONGEST_SECONDS
    ):
        message = f"expires_after[seconds] must be a number from {SHORTEST_SECONDS} to {LONGEST_SECONDS}."
        raise bad_request(message, param="expires_after[seconds]")
    return int(text)


def page(items: Sequence[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """One page of a list."""
    return {
        "object": "list",
        "data": list(items),
        "first_id": items[0]["id"] if items else None,
        "last_id": items[-1]["id"] if items else None,
        "has_more": has_more,
    }
