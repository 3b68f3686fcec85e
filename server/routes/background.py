"""Responses that run without a client: in a task of their own, which ends with the server at the latest."""

import asyncio
from contextlib import ExitStack, aclosing

from server import logs
from server.chat_run import Events
from server.errors import ApiError, internal
from server.protocol.responses_events import Event, ResponseBuilder, encode
from server.protocol.responses_store import Stored
from server.routes.stream import shutting_down
from server.state import ServerState


def run_in_background(
    state: ServerState, stored: Stored, builder: ResponseBuilder, events: Events, stack: ExitStack
) -> None:
    """Begin to answer; `stored` follows and `stack` closes at the end. Cancelling `stored.task` ends it at once."""

    def emit(made: list[Event]) -> None:
        if stored.log is not None:
            for event in made:
                state.responses.log(stored, encode(event))

    async def answer() -> None:
        async with aclosing(events):
            async for news in events:
                if not builder.has_started:
                    emit(builder.start())
                emit(builder.add(news))

    async def run() -> None:
        work = asyncio.create_task(answer())
        waited: set[asyncio.Future[None]] = {work, state.stopping}
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            else:
                emit(builder.fail(shutting_down()))
        except asyncio.CancelledError:
            return
        except ApiError as error:
            emit(builder.fail(error))
        except Exception as error:  # noqa: BLE001  nobody awaits this task: the log gets the place, the client an answer
            logs.server.error("background response %s failed: %s", stored.response_id, logs.failure(error))
            emit(builder.fail(internal()))
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    def over(task: "asyncio.Task[None]") -> None:
        # Not in the task itself: a task can be cancelled before it begins and while it cleans up.
        builder.cancel()
        state.responses.finish(stored)
        stack.close()

    emit(builder.enqueue())
    stored.task = asyncio.create_task(run())
    stored.task.add_done_callback(over)
