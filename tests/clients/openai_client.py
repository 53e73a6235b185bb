"""OpenAI's Python client, used as its documentation says, with nothing adapted."""

import asyncio
import re
from typing import Literal

import openai
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from shared import GREEDY, KEY, URL, adds_up, left_early, refused

PLACE = dict(base_url=f"{URL}/v1", max_retries=0, timeout=120)


def user(text):
    return [{"role": "user", "content": text}]


def check_models(client):
    models = client.models.list().data
    bundle = next(m for m in models if m.parent is None)
    tasks = [m for m in models if m.parent == bundle.id]
    assert bundle.object == "model" and bundle.owned_by == "shoal"
    assert len(tasks) == len(models) - 1
    assert client.models.retrieve(bundle.id) == bundle
    return bundle.id, [m.id for m in tasks]


def check_whole(client, model):
    reply = client.completions.create(model=model, prompt="a fox in snow", max_tokens=8)
    assert reply.object == "text_completion" and reply.model == model
    assert reply.id.startswith("cmpl-") and reply.created > 0
    choice = reply.choices[0]
    assert choice.index == 0 and choice.finish_reason in ("stop", "length")
    assert adds_up(reply.usage.model_dump()) and reply.usage.completion_tokens <= 8
    raw = client.completions.with_raw_response.create(
        model=model, prompt="a fox", max_tokens=1, extra_headers={"x-request-id": "from-python"}
    )
    assert raw.headers["x-request-id"] == "from-python"
    assert raw.headers["server-timing"].startswith("queue;dur=")


def check_stream(client, model):
    request = dict(model=model, prompt="a fox in snow", **GREEDY)
    whole = client.completions.create(**request)
    chunks = list(
        client.completions.create(**request, stream=True, stream_options={"include_usage": True})
    )
    last = chunks.pop()
    assert last.choices == [] and last.usage == whole.usage
    assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len({(c.id, c.model) for c in [*chunks, last]}) == 1
    assert all(c.usage is None for c in chunks)


def check_choices(client, bundle):
    request = dict(model=bundle, prompt=["one", "two"], max_tokens=6, n=2, seed=7)
    first = client.completions.create(**request)
    assert [c.index for c in first.choices] == [0, 1, 2, 3]
    again = client.completions.create(**request)
    assert [c.text for c in first.choices] == [c.text for c in again.choices]


def check_logprobs(client, bundle):
    reply = client.completions.create(
        model=bundle, prompt="one two", max_tokens=0, echo=True, logprobs=2
    )
    logprobs = reply.choices[0].logprobs
    assert reply.choices[0].text == "one two" and "".join(logprobs.tokens) == "one two"
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert logprobs.text_offset[0] == 0
    for token, value, top in list(
        zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs)
    )[1:]:
        assert top[token] == value and 2 <= len(top) <= 3


def check_chat(client, task):
    """A chat with a task is its input: the same text as by the older API."""
    request = dict(model=task, messages=user("a fox in snow"), **GREEDY)
    reply = client.chat.completions.create(**request)
    assert reply.object == "chat.completion" and reply.id.startswith("chatcmpl-")
    assert reply.model == task and adds_up(reply.usage.model_dump())
    [choice] = reply.choices
    assert choice.index == 0 and choice.finish_reason in ("stop", "length")
    assert choice.message.role == "assistant" and choice.message.content
    older = client.completions.create(model=task, prompt="a fox in snow", **GREEDY)
    assert older.choices[0].text == choice.message.content and older.usage == reply.usage

    parts = [{"role": "user", "content": [{"type": "text", "text": "a fox in snow"}]}]
    again = client.chat.completions.create(
        **{**request, "messages": parts}, extra_headers={"x-request-id": "from-a-chat"}
    )
    assert again.choices[0].message.content == choice.message.content
    assert again._request_id == "from-a-chat" and again.id == "chatcmpl-from-a-chat"


def check_chat_stream(client, task):
    request = dict(model=task, messages=user("a fox in snow"), **GREEDY)
    whole = client.chat.completions.create(**request)
    content = whole.choices[0].message.content
    chunks = list(
        client.chat.completions.create(
            **request, stream=True, stream_options={"include_usage": True}
        )
    )
    last = chunks.pop()
    assert last.choices == [] and last.usage == whole.usage
    assert {c.object for c in chunks} == {"chat.completion.chunk"}
    assert len({(c.id, c.model, c.created) for c in [*chunks, last]}) == 1
    assert all(c.usage is None for c in chunks)
    choices = [c.choices[0] for c in chunks]
    assert choices[0].delta.role == "assistant"
    assert "".join(c.delta.content or "" for c in choices) == content
    assert [c.finish_reason for c in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1].finish_reason == whole.choices[0].finish_reason

    with client.chat.completions.stream(**request) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        # The client takes only what ended by itself for final; this may end at its length.
        seen = stream.current_completion_snapshot
    assert "".join(deltas) == content == seen.choices[0].message.content


def check_chat_options(client, task):
    def create(**fields):
        return client.chat.completions.create(
            **{"model": task, "messages": user("a fox in snow"), **GREEDY, **fields}
        )

    def texts(reply):
        return [c.message.content for c in reply.choices]

    several = dict(n=3, seed=7, temperature=1)
    assert len(texts(create(**several))) == 3
    assert texts(create(**several)) == texts(create(**several))

    [text] = texts(create())
    stop = text[4:7]
    assert texts(create(stop=[stop])) == [text[: text.index(stop)]]

    [choice] = create(logprobs=True, top_logprobs=2).choices
    tokens = choice.logprobs.content
    assert b"".join(bytes(t.bytes) for t in tokens).decode() == choice.message.content
    for token in tokens:
        assert token.logprob <= 0 and len(token.top_logprobs) == 2
        assert token.top_logprobs[0].token == token.token

    steered = dict(extra_body={"controls": {"words": 5}})
    older = client.completions.create(model=task, prompt="a fox in snow", **GREEDY, **steered)
    assert texts(create(**steered)) == [older.choices[0].text]


def check_turns(client, task):
    """A reply goes back as it came. A task takes one message, and that is all that is wrong with it."""

    def ask(*turns):
        messages = [*user("a fox"), *turns, *user("another")]
        return client.chat.completions.create(model=task, messages=messages, **GREEDY)

    [choice] = client.chat.completions.create(
        model=task, messages=user("a fox"), logprobs=True, **GREEDY
    ).choices
    message = choice.message
    for turn in (message, message.model_dump(), message.to_dict()):
        error = refused(openai.BadRequestError, lambda: ask(turn), "one user message")
        assert error.param == "messages", error


class Scene(BaseModel):
    mood: Literal["calm", "tense", "merry"]
    snow: bool


def check_structured(client, task):
    def create(**fields):
        reply = client.chat.completions.create(
            model=task, messages=user("a fox in snow"), temperature=0, max_tokens=40, **fields
        )
        return reply.choices[0].message.content

    assert create(extra_body={"choice": ["a cat", "a dog"]}) in ("a cat", "a dog")
    assert re.fullmatch("[a-z]{3}-[0-9]{2}", create(extra_body={"regex": "[a-z]{3}-[0-9]{2}"}))
    request = dict(model=task, messages=user("a fox"), temperature=0, response_format=Scene)
    parsed = client.chat.completions.parse(**request, max_tokens=100).choices[0].message.parsed
    assert isinstance(parsed, Scene)
    with client.chat.completions.stream(**request, max_tokens=100) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed
    refused(openai.BadRequestError, lambda: create(extra_body={"regex": "("}), "regex")
    refused(openai.BadRequestError, lambda: create(extra_body={"choice": []}), "choice")
    impossible = {"name": "x", "schema": {"type": "no such type"}}
    refused(
        openai.BadRequestError,
        lambda: create(response_format={"type": "json_schema", "json_schema": impossible}),
        "response_format",
    )


def check_errors(client, bundle, task):
    def create(**fields):
        return client.completions.create(**{"model": bundle, "prompt": "x", **fields})

    def chat(**fields):
        return client.chat.completions.create(**{"model": task, "messages": user("x"), **fields})

    def bad(param, call):
        error = refused(openai.BadRequestError, call)
        assert error.param == param and error.body["message"] and error.request_id, error

    def absent(call):
        error = refused(openai.NotFoundError, call)
        assert error.param == "model" and error.body["message"], error

    for create_with in (create, chat):
        absent(lambda: create_with(model="nobody"))
        absent(lambda: create_with(model="nobody", stream=True))
        bad("temperature", lambda: create_with(temperature=9))
        bad("top_kk", lambda: create_with(extra_body={"top_kk": 1}))
        bad("max_tokens", lambda: create_with(max_tokens=10**6))
        unknown = {"model": task, "extra_body": {"controls": {"no_such_control": 1}}}
        bad("controls.no_such_control", lambda: create_with(**unknown))
        steered = {"model": task, "extra_body": {"controls": {"words": 1000}}}
        bad("controls.words", lambda: create_with(**steered))
    absent(lambda: client.models.retrieve("nobody"))
    bad("messages", lambda: chat(messages=[]))
    bad("suffix", lambda: create(suffix="x"))
    # The shipped bundle has no chat template, and says so.
    refused(openai.BadRequestError, lambda: chat(model=bundle), "template")
    late = refused(
        openai.InternalServerError, lambda: chat(max_tokens=100, extra_body={"timeout_ms": 0.01})
    )
    assert late.status_code == 504 and late.code == "deadline_exceeded"


def check_keys(bundle):
    for key in ("not-a-key", KEY + "x", KEY[:-1]):
        stranger = OpenAI(**PLACE, api_key=key)
        error = refused(openai.AuthenticationError, stranger.models.list)
        assert error.code == "invalid_api_key" and key not in str(error)


def check_leaving(client, task):
    """Streams that are left in the middle free what they held."""
    long = dict(max_tokens=150, n=4, temperature=1, extra_body={"ignore_eos": True}, stream=True)
    with left_early(), client.completions.create(model=task, prompt="a fox", **long) as stream:
        next(iter(stream))
    chat = client.chat.completions
    with left_early(), chat.create(model=task, messages=user("a fox"), **long) as stream:
        next(iter(stream))


async def check_many(task):
    """Many at once are each answered as alone; far too many are refused in so many words."""
    async with AsyncOpenAI(**PLACE, api_key=KEY) as client:

        def ask(**fields):
            request = dict(model=task, messages=user("a fox in snow"), **GREEDY)
            return client.chat.completions.create(**{**request, **fields})

        replies = await asyncio.gather(*(ask() for _ in range(8)))
        assert len({r.choices[0].message.content for r in replies}) == 1

        flood = dict(n=16, max_tokens=100, extra_body={"ignore_eos": True})
        answers = await asyncio.gather(*(ask(**flood) for _ in range(12)), return_exceptions=True)
        refusals = [a for a in answers if isinstance(a, openai.RateLimitError)]
        assert 0 < len(refusals) < len(answers), "all or nothing was refused"
        for refusal in refusals:
            assert int(refusal.response.headers["retry-after"]) >= 1
            assert refusal.type == "rate_limit_error"
        assert all(len(a.choices) == 16 for a in answers if a not in refusals)


def main():
    client = OpenAI(**PLACE, api_key=KEY)
    bundle, tasks = check_models(client)
    task = tasks[0]
    for model in [bundle, *tasks]:
        check_whole(client, model)
        check_stream(client, model)
    check_choices(client, bundle)
    check_logprobs(client, bundle)
    check_keys(bundle)
    for task in tasks:
        check_chat(client, task)
    check_chat_stream(client, task)
    check_chat_options(client, task)
    check_turns(client, task)
    check_structured(client, task)
    check_errors(client, bundle, task)
    check_leaving(client, task)
    asyncio.run(check_many(task))
    print(f"openai {openai.__version__}: {bundle} and {len(tasks)} tasks")


main()
