"""Asks the rules about content of what passes through a broker that can see it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial

from mitmproxy import http

from vmsandbox.broker.answers import Refused, by_decision
from vmsandbox.broker.exchange import Exchange, texts
from vmsandbox.broker.record import Recorder
from vmsandbox.egress.content import Content, Outgoing, ResponseWatch
from vmsandbox.egress.values import BrokerConfig

_AT_ONCE = 64 << 10  # bytes that are looked through without a thread


class Inside:
    """The content rules of one broker. needs_body: whether requests have to be whole before they go on."""

    def __init__(self, config: BrokerConfig) -> None:
        policy = config.policy
        self._content = Content(config)
        self._one_at_a_time = asyncio.Lock()
        self.needs_body = bool(policy.dlp.secrets or policy.dlp.canaries or policy.secrets or config.canaries)

    async def look(self, exchange: Exchange, request: http.Request, body: bytes, recorder: Recorder) -> None:
        """Look through a request, and put in what it is to be sent with; raises Refused."""
        exchange.headers = texts(request.headers)
        asked = (exchange.to, exchange.method, exchange.target, exchange.headers, body)
        ask = partial(self._content.outgoing, *asked, tls=request.scheme == "https")
        async with self._one_at_a_time:
            if len(body) > _AT_ONCE:
                outgoing = await asyncio.get_running_loop().run_in_executor(None, ask)
            else:
                outgoing = ask()
        _tell(exchange, outgoing, recorder)
        request.headers = http.Headers([(_bytes(name), _bytes(value)) for name, value in outgoing.headers])

    async def say(self, exchange: Exchange, message: bytes, recorder: Recorder) -> None:
        """Look through a message of a WebSocket; raises Refused."""
        async with self._one_at_a_time:
            outgoing = self._content.outgoing(exchange.to, exchange.method, exchange.target, [], message)
        _tell(exchange, outgoing, recorder)

    def watch(self, exchange: Exchange) -> ResponseWatch | None:
        """What wants to see the answer, or None."""
        return self._content.watch(exchange.to, exchange.method, exchange.target, exchange.headers)


def _tell(exchange: Exchange, outgoing: Outgoing, recorder: Recorder) -> None:
    """Tell of what was found; raises Refused. What was found in the path is not written down with it."""
    for event in outgoing.events:
        in_path = event.more.get("where", "").startswith("path")
        more = {**event.more, "freeze": "yes"} if outgoing.freeze else event.more
        recorder.tell(replace(event, via=exchange.via, path="" if in_path else exchange.path, more=more))
    if not outgoing.decision.allowed:
        if outgoing.events:
            exchange.path = ""
        raise Refused(by_decision(outgoing.decision, exchange.to))


def _bytes(value: str) -> bytes:
    return value.encode("utf-8", "surrogateescape")
