"""What `mnemobus verify` asks an agent about a scope, and what the agent answers. Both are JSON, on channels.

A question goes to the agent's own channel, and names the channel for the answer:

    {"ask": number, "scope": scope, "reply": channel}

An answer says what hits on that scope would return in that agent now, by versions:

    {"agent": id, "ask": number, "fresh": bool, "position": ID or null, "holds": [[field, answer], ...], "cut": bool}

field     the name of the query in L2
answer    [[id, version], ...] in order, or a count
fresh     whether the agent serves local copies at all; if not, its copies do not count
position  of the agent in the scope's feed partition; null if it doesn't listen there
cut       whether some answers were left out for their size; each answer is given whole or not at all
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

from ..cache.query import Question, Versions, versions_of
from ..keys import Keyspace, Version

MAX_QUESTION = 4096
"""Most bytes of a question; a longer message is refused."""
MAX_TOLD = 2_000
"""Most memories and counts in one answer."""


class Inquiry(NamedTuple):
    """A question about a scope."""

    number: int
    scope: str
    reply: str


class Holding(NamedTuple):
    """An agent's answer; `holds` is by field."""

    agent: str
    number: int
    fresh: bool
    position: Version | None
    holds: dict[str, Versions]
    cut: bool


def encode_inquiry(inquiry: Inquiry) -> bytes:
    return orjson.dumps({"ask": inquiry.number, "scope": inquiry.scope, "reply": inquiry.reply})


def decode_inquiry(data: bytes, keys: Keyspace) -> Inquiry:
    """The question; ValueError if the message is not one, or names a reply channel that is not for answers."""
    if len(data) > MAX_QUESTION:
        raise ValueError("too long for a question")
    body = orjson.loads(data)
    if not isinstance(body, dict):
        raise ValueError("no JSON object")
    number, scope, reply = body.get("ask"), body.get("scope"), body.get("reply")
    if not isinstance(number, int) or not isinstance(scope, str):
        raise ValueError("ask or scope is missing or of another type")
    if not isinstance(reply, str) or not reply.startswith(keys.verify_channel("")):
        raise ValueError("reply is no channel for answers")
    return Inquiry(number, scope, reply)


def encode_holding(
    agent: str,
    inquiry: Inquiry,
    fresh: bool,
    position: Version | None,
    served: Mapping[Any, Any],
) -> bytes:
    """The answer of an agent that would serve these results; they are by their keys in L1."""
    holds: list[Any] = []
    told = 0
    cut = False
    for key, value in served.items():
        versions = versions_of(value)
        size = 1 if isinstance(versions, int) else 1 + len(versions)
        if told + size > MAX_TOLD:
            cut = True
            continue
        told += size
        shown = versions if isinstance(versions, int) else [(id, str(version)) for id, version in versions]
        holds.append((Question.local(inquiry.scope, key).field.decode(), shown))
    return orjson.dumps(
        {
            "agent": agent,
            "ask": inquiry.number,
            "fresh": fresh,
            "position": None if position is None else str(position),
            "holds": holds,
            "cut": cut,
        }
    )


def decode_holding(data: bytes) -> Holding:
    """The answer; ValueError if the message is not one."""
    body = orjson.loads(data)
    try:
        position = body["position"]
        return Holding(
            str(body["agent"]),
            int(body["ask"]),
            bool(body["fresh"]),
            None if position is None else Version.parse(position),
            {str(field): _versions(answer) for field, answer in body["holds"]},
            bool(body["cut"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no answer: {error!r}") from None


def _versions(answer: Any) -> Versions:
    if isinstance(answer, int):
        return answer
    return tuple((str(id), Version.parse(version)) for id, version in answer)
