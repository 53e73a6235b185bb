"""The official OpenAI client against a running server: python openai_client.py http://127.0.0.1:8000

It is used as its documentation says, with nothing adapted. Any task will do: texts are only compared
with each other, never with what a good model would write.
"""

import sys

import openai
from openai import OpenAI


def check_models(client):
    models = client.models.list().data
    bundle = models[0]
    tasks = [m for m in models if m.parent == bundle.id]
    assert bundle.parent is None and bundle.object == "model" and bundle.owned_by == "shoal"
    assert len(tasks) == len(models) - 1
    assert client.models.retrieve(bundle.id) == bundle
    return bundle.id, [m.id for m in tasks]


def check_whole(client, model):
    reply = client.completions.create(model=model, prompt="a fox in snow", max_tokens=8)
    assert reply.object == "text_completion" and reply.model == model
    assert reply.id.startswith("cmpl-") and reply.created > 0
    choice = reply.choices[0]
    assert choice.index == 0 and choice.finish_reason in ("stop", "length")
    usage = reply.usage
    assert usage.prompt_tokens > 0 and usage.completion_tokens <= 8
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    raw = client.completions.with_raw_response.create(
        model=model, prompt="a fox", max_tokens=1, extra_headers={"x-request-id": "from-python"}
    )
    assert raw.headers["x-request-id"] == "from-python"
    assert raw.headers["server-timing"].startswith("queue;dur=")


def check_stream(client, model):
    request = dict(model=model, prompt="a fox in snow", max_tokens=12, temperature=0)
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
    with client.completions.create(**request, stream=True) as stream:
        next(iter(stream))  # and leave in mid-stream


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


def check_task(client, task):
    reply = client.completions.create(
        model=task, prompt="a fox", max_tokens=8, extra_body={"controls": {}, "timeout_ms": 60000}
    )
    assert reply.model == task
    refused(
        openai.BadRequestError,
        "controls.no_such_control",
        lambda: client.completions.create(
            model=task, prompt="a fox", extra_body={"controls": {"no_such_control": 1}}
        ),
    )


def check_errors(client, bundle):
    def create(**fields):
        return client.completions.create(**{"model": bundle, "prompt": "x", **fields})

    refused(openai.NotFoundError, "model", lambda: create(model="nobody"))
    refused(openai.NotFoundError, "model", lambda: create(model="nobody", stream=True))
    refused(openai.NotFoundError, "model", lambda: client.models.retrieve("nobody"))
    refused(openai.BadRequestError, "temperature", lambda: create(temperature=9))
    refused(openai.BadRequestError, "top_kk", lambda: create(extra_body={"top_kk": 1}))
    refused(openai.BadRequestError, "max_tokens", lambda: create(max_tokens=10**6))


def refused(kind, param, call):
    try:
        call()
    except kind as error:
        assert error.param == param, (error.param, param)
        assert error.body["message"]
    else:
        raise AssertionError(f"{param} was not refused")


def main(url):
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    bundle, tasks = check_models(client)
    for model in [bundle, *tasks]:
        check_whole(client, model)
        check_stream(client, model)
    check_choices(client, bundle)
    check_logprobs(client, bundle)
    for task in tasks:
        check_task(client, task)
    check_errors(client, bundle)
    print(f"openai {openai.__version__}: {bundle} and {len(tasks)} tasks pass")


main(sys.argv[1].rstrip("/"))
