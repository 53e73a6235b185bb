"""The `text-generation` package: the client that text-generation-inference's users wrote against."""

import asyncio
import importlib.metadata
import re

from text_generation import AsyncClient, Client
from text_generation.errors import NotFoundError, UnknownError, ValidationError
from text_generation.types import FinishReason, Grammar, GrammarType, Message

from shared import BEARER, URL, left_early, refused

PROMPT = "a fox in snow"
HEADERS = {"Authorization": BEARER}


def check_generate(client):
    reply = client.generate(PROMPT, max_new_tokens=12)
    details = reply.details
    assert reply.generated_text
    assert details.finish_reason in (FinishReason.Length, FinishReason.EndOfSequenceToken)
    assert details.generated_tokens == len(details.tokens) <= 12
    assert details.prefill == [] and details.seed is None
    assert "".join(t.text for t in details.tokens if not t.special) == reply.generated_text
    assert all(token.logprob <= 0 for token in details.tokens if not token.special)
    assert client.generate(PROMPT, max_new_tokens=12) == reply

    frames = list(client.generate_stream(PROMPT, max_new_tokens=12))
    assert [frame.token for frame in frames] == details.tokens
    assert [frame.generated_text for frame in frames[:-1]] == [None] * (len(frames) - 1)
    last = frames[-1]
    assert last.generated_text == reply.generated_text
    assert last.details.finish_reason == details.finish_reason
    assert last.details.generated_tokens == details.generated_tokens


def check_options(client):
    sampled = dict(max_new_tokens=12, do_sample=True, temperature=1.0, seed=7)
    reply = client.generate(PROMPT, **sampled)
    assert reply.details.seed == 7 and reply == client.generate(PROMPT, **sampled)

    text = client.generate(PROMPT, max_new_tokens=12).generated_text
    assert client.generate(PROMPT, max_new_tokens=12, return_full_text=True).generated_text == (
        PROMPT + text
    )

    stop = re.findall(r"\w+", text)[2]
    stopped = client.generate(PROMPT, max_new_tokens=12, stop_sequences=[stop])
    assert stopped.details.finish_reason == FinishReason.StopSequence

    top = client.generate(PROMPT, max_new_tokens=4, top_n_tokens=2).details
    assert [len(tokens) for tokens in top.top_tokens] == [2] * top.generated_tokens

    grammar = Grammar(type=GrammarType.Regex, value="[a-z]{3}-[0-9]{2}")
    fitting = client.generate(PROMPT, max_new_tokens=40, grammar=grammar).generated_text
    assert re.fullmatch(grammar.value, fitting)


def check_errors(client):
    def ask(**parameters):
        return client.generate(PROMPT, **parameters)

    refused(ValidationError, lambda: ask(max_new_tokens=10**6), "max_new_tokens")
    refused(ValidationError, lambda: ask(watermark=True), "watermark")
    stream = lambda: next(client.generate_stream(PROMPT, max_new_tokens=10**6))
    refused(ValidationError, stream, "max_new_tokens")
    # Its chats name the model `tgi`, whatever is served; nothing else is wrong with them.
    refused(NotFoundError, lambda: client.chat([Message(role="user", content=PROMPT)]), "tgi")
    stranger = Client(URL, headers={"Authorization": "Bearer not-a-key"})
    refused(UnknownError, lambda: stranger.generate(PROMPT), "key")


async def check_async():
    """Many at once are each answered as alone."""
    client = AsyncClient(URL, headers=HEADERS, timeout=120)
    asked = [client.generate(PROMPT, max_new_tokens=12) for _ in range(8)]
    replies = await asyncio.gather(*asked)
    assert len({reply.generated_text for reply in replies}) == 1
    tokens = [frame.token async for frame in client.generate_stream(PROMPT, max_new_tokens=12)]
    assert tokens == replies[0].details.tokens


def check_leaving(client):
    """A stream that is left in the middle frees what it held. Greedy raw text goes on and on."""
    with left_early():
        stream = client.generate_stream(PROMPT, max_new_tokens=200)
        next(stream)
        stream.close()


def main():
    client = Client(URL, headers=HEADERS, timeout=120)
    check_generate(client)
    check_options(client)
    check_errors(client)
    asyncio.run(check_async())
    check_leaving(client)
    print(f"text-generation {importlib.metadata.version('text-generation')}")


main()
