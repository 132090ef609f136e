"""Pass deliveries to the connections of the clients that wait for them.

A policy may have something for a session while another session's message is handled, or when a
time is over.  If the client has no connection, its session holds the result of a step until it
returns.  Other things are not kept, because the client asks for them again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress

from splitonnx.names import ACCUMULATE, STEP_PHASES
from splitonnx.runtime.server.contexts import ServerContext
from splitonnx.runtime.server.policies.tasks import Delivery

TICK_SECONDS = 0.5
"""Seconds between two questions to the policy whether something is due."""

_logger = logging.getLogger("splitonnx.server")


def pass_on(context: ServerContext, delivery: Delivery) -> None:
    """Pass a delivery to the newest connection of its session; call it on the event loop."""
    name = delivery.key.session
    holder = context.holders.get(name)
    if holder is not None:
        holder.deliver(delivery)
        return
    for session in context.registry.sessions:
        if session.id == name:
            session.hold(delivery)
            _settle(context, delivery)


def _settle(context: ServerContext, delivery: Delivery) -> None:
    """Release the memory of a step that has ended while its client has no connection."""
    key, budget = delivery.key, context.budget
    if budget is None or key.phase not in STEP_PHASES:
        return
    is_over = delivery.error is not None or (delivery.is_last and key.phase != ACCUMULATE)
    for phase in STEP_PHASES:
        (budget.release if is_over else budget.pause)((key.session, phase))


async def keep_ticking(context: ServerContext) -> None:
    """Ask the policy repeatedly what is due, until the server stops."""
    policy = context.registry.policy
    while not context.stop.is_set():
        with suppress(TimeoutError):
            await asyncio.wait_for(context.stop.wait(), TICK_SECONDS)
        try:
            due = await context.storage.run(context, lambda: list(policy.tick(time.monotonic())))
        except Exception:  # clients are waiting; what fails once may succeed the next time
            _logger.exception("nothing was done about the rounds that may be over")
            continue
        for delivery in due:
            pass_on(context, delivery)
