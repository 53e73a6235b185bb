"""Hugging Face's InferenceClient, as users of text-generation-inference and of its chats call it."""

import json
import re

import huggingface_hub
from huggingface_hub import InferenceClient
from huggingface_hub.errors import BadRequestError, HfHubHTTPError, ValidationError

from shared import KEY, URL, adds_up, left_early, model, refused, tasks

PROMPT = "a fox in snow"
MESSAGES = [{"role": "user", "content": PROMPT}]


def check_text(client, task):
    text = client.text_generation(PROMPT, max_new_tokens=12)
    assert isinstance(text, str) and text
    assert client.text_generation(PROMPT, max_new_tokens=12) == text, "greedy without a word"

    detailed = client.text_generation(PROMPT, max_new_tokens=12, details=True)
    assert detailed.generated_text == text
    details = detailed.details
    assert details.finish_reason in ("length", "eos_token")
    assert details.generated_tokens == len(details.tokens) <= 12
    assert "".join(t.text for t in details.tokens if not t.special) == text
    assert all(isinstance(t.id, int) for t in details.tokens)
    assert all(t.logprob <= 0 for t in details.tokens if not t.special)

    whole = client.text_generation(PROMPT, max_new_tokens=12, return_full_text=True)
    assert whole == PROMPT + text

    sampled = dict(max_new_tokens=12, do_sample=True, temperature=1.0, seed=7)
    assert client.text_generation(PROMPT, **sampled) == client.text_generation(PROMPT, **sampled)

    steered = client.text_generation(PROMPT, adapter_id=task, max_new_tokens=12)
    assert steered == client.text_generation(PROMPT, adapter_id=task, max_new_tokens=12)


def check_text_stream(client, task):
    for request in (dict(max_new_tokens=12), dict(max_new_tokens=12, adapter_id=task)):
        whole = client.text_generation(PROMPT, **request)
        texts = list(client.text_generation(PROMPT, **request, stream=True))
        frames = list(client.text_generation(PROMPT, **request, stream=True, details=True))
        tokens = [frame.token for frame in frames]
        assert texts == [token.text for token in tokens]
        assert "".join(token.text for token in tokens if not token.special) == whole
        *frames, last = frames
        assert all(f.generated_text is None and f.details is None for f in frames)
        assert last.generated_text == whole
        assert last.details.generated_tokens == len(frames) + 1
        assert last.details.input_length > 0
        assert last.details.finish_reason in ("length", "eos_token")


def check_text_options(client):
    [stop] = re.findall(r"\w+", client.text_generation(PROMPT, max_new_tokens=12))[2:3]
    stopped = client.text_generation(PROMPT, max_new_tokens=12, stop=[stop], details=True)
    assert stopped.details.finish_reason == "stop_sequence"

    grammar = {"type": "regex", "value": "[a-z]{3}-[0-9]{2}"}
    text = client.text_generation(PROMPT, grammar=grammar, max_new_tokens=40)
    assert re.fullmatch(grammar["value"], text)

    top = client.text_generation(PROMPT, details=True, top_n_tokens=2, max_new_tokens=4).details
    assert [len(tokens) for tokens in top.top_tokens] == [2] * top.generated_tokens
    for token, likeliest in zip(top.tokens, top.top_tokens):
        # The library leaves lists in lists as they came.
        assert token.id == likeliest[0]["id"]


def check_text_errors(client):
    def ask(**parameters):
        return client.text_generation(PROMPT, **parameters)

    refused(ValidationError, lambda: ask(temperature=-1.0), "temperature")
    refused(ValidationError, lambda: ask(max_new_tokens=10**6), "max_new_tokens")
    refused(ValidationError, lambda: list(ask(temperature=-1.0, stream=True)), "temperature")
    refused(HfHubHTTPError, lambda: ask(adapter_id="nobody"), "nobody")
    stranger = InferenceClient(base_url=URL, api_key="not-a-key")
    for call in (
        lambda: stranger.text_generation(PROMPT),
        lambda: list(stranger.text_generation(PROMPT, stream=True)),
        lambda: stranger.chat_completion(MESSAGES, model="any"),
    ):
        assert refused(HfHubHTTPError, call, "key").response.status_code == 401


def check_chat(client, task):
    request = dict(messages=MESSAGES, model=task, temperature=0, max_tokens=12)
    reply = client.chat_completion(**request)
    [choice] = reply.choices
    assert reply.model == task and adds_up(reply.usage)
    assert choice.message.role == "assistant" and choice.message.content
    assert client.chat.completions.create(**request).choices == reply.choices

    options = dict(stream=True, stream_options={"include_usage": True})
    *chunks, last = client.chat_completion(**request, **options)
    # Equal in all but their class.
    assert last.choices == [] and dict(last.usage) == dict(reply.usage)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == choice.message.content

    chosen = client.chat_completion(**request, extra_body={"choice": ["a cat", "a dog"]})
    assert chosen.choices[0].message.content in ("a cat", "a dog")

    likely = client.chat_completion(**request, logprobs=True, top_logprobs=2).choices[0].logprobs
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in likely.content)

    steered = client.chat_completion(**request, extra_body={"controls": {"words": 5}})
    assert steered.choices[0].message.content


def check_chat_structured(client, task):
    """The client rewrites `json_schema` into text-generation-inference's own form."""
    schema = {
        "type": "object",
        "properties": {"mood": {"enum": ["calm", "tense"]}},
        "required": ["mood"],
        "additionalProperties": False,
    }
    reply = client.chat_completion(
        MESSAGES,
        model=task,
        temperature=0,
        max_tokens=100,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )
    assert json.loads(reply.choices[0].message.content)["mood"] in ("calm", "tense")


def check_chat_errors(client, task):
    def chat(**fields):
        return client.chat_completion(**{"messages": MESSAGES, "model": task, **fields})

    refused(BadRequestError, lambda: chat(temperature=9), "temperature")
    refused(BadRequestError, lambda: chat(extra_body={"top_kk": 1}), "top_kk")
    refused(HfHubHTTPError, lambda: chat(model="nobody"), "nobody")
    # A reply goes back as it came. A task takes one message, and that is all that is wrong with it.
    said = chat(max_tokens=4).choices[0].message
    turns = [*MESSAGES, said, *MESSAGES]
    refused(BadRequestError, lambda: chat(messages=turns), "one user message")


def check_leaving():
    """A client that is closed in mid-stream frees what it held. Greedy raw text goes on and on."""
    with left_early(), InferenceClient(base_url=URL, api_key=KEY) as client:
        next(iter(client.text_generation(PROMPT, max_new_tokens=200, stream=True)))


def check_endpoint(bundle):
    # Only under this provider's name does the client ask a server about itself.
    client = InferenceClient(URL, provider="hf-inference", api_key=KEY)
    assert client.health_check()
    info = client.get_endpoint_info()
    assert info["model_id"] == bundle and info["max_total_tokens"] > 0 and info["version"]


def main():
    client = InferenceClient(base_url=URL, api_key=KEY, timeout=120)
    bundle, [task, *_] = model(), tasks()
    check_text(client, task)
    check_text_stream(client, task)
    check_text_options(client)
    check_text_errors(client)
    check_chat(client, task)
    check_chat_structured(client, task)
    check_chat_errors(client, task)
    check_leaving()
    check_endpoint(bundle)
    print(f"huggingface_hub {huggingface_hub.__version__}: text generation and chat")


main()
