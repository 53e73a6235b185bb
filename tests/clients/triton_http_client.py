"""NVIDIA's tritonclient over HTTP: KServe's Open Inference Protocol, and its generate extension."""

import importlib.metadata
import json
import re
import urllib.request

import numpy as np
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from shared import BEARER, URL, fetch, left_early, model, tasks

GREEDY = {"max_tokens": 12, "temperature": 0.0}
TEXTS = ["a fox in snow", "ein Bär", "東京"]


def headers(**more):
    # The client writes headers of its own into the dictionary that it is given.
    return {"authorization": BEARER, **more}


def text_input(texts, **how):
    tensor = InferInput("text_input", [len(texts)], "BYTES")
    tensor.set_data_from_numpy(np.array(texts, dtype=object), **how)
    return tensor


def texts_of(result):
    return [
        text.decode() if isinstance(text, bytes) else text
        for text in result.as_numpy("text_output")
    ]


def check_server(client, names):
    # Probes need no key.
    assert client.is_server_live() and client.is_server_ready()
    metadata = client.get_server_metadata(headers=headers())
    assert metadata["name"] and metadata["version"] and isinstance(metadata["extensions"], list)
    for name in names:
        assert client.is_model_ready(name, headers=headers())
        described = client.get_model_metadata(name, headers=headers())
        assert described["name"] == name and described["platform"]
        inputs = {tensor["name"]: tensor["datatype"] for tensor in described["inputs"]}
        outputs = {tensor["name"]: tensor["datatype"] for tensor in described["outputs"]}
        assert inputs["text_input"] == outputs["text_output"] == "BYTES"
    assert not client.is_model_ready("nobody", headers=headers())


def check_infer(client, task):
    """Binary and JSON tensors, in and out, hold the same texts."""

    def infer(texts, binary_in, outputs=None, **fields):
        return client.infer(
            task,
            [text_input(texts, binary_data=binary_in)],
            outputs=outputs,
            headers=headers(),
            parameters=GREEDY,
            **fields,
        )

    expected = [texts_of(infer([text], True))[0] for text in TEXTS]
    assert all(expected)
    for binary_in in (True, False):
        for binary_out in (True, False):
            outputs = [InferRequestedOutput("text_output", binary_data=binary_out)]
            result = infer(TEXTS, binary_in, outputs, request_id="r-1")
            assert texts_of(result) == expected
            output = result.get_output("text_output")
            assert output["shape"] == [len(TEXTS)] and output["datatype"] == "BYTES"
            assert ("data" in output) is not binary_out
            reply = result.get_response()
            assert reply["id"] == "r-1" and reply["model_name"] == task

    native = fetch(f"/v1/tasks/{task}/generate", {"input": TEXTS[0], **GREEDY})
    assert native["choices"][0]["text"] == expected[0]

    pending = [
        client.async_infer(task, [text_input([TEXTS[0]])], headers=headers(), parameters=GREEDY)
        for _ in range(4)
    ]
    assert [texts_of(answer.get_result()) for answer in pending] == [expected[:1]] * 4


def check_parameters(client, task):
    def infer(**parameters):
        tensor = text_input([TEXTS[0]])
        result = client.infer(task, [tensor], headers=headers(), parameters=parameters)
        return texts_of(result)[0]

    sampled = dict(max_tokens=12, temperature=1.0, seed=7)
    assert infer(**sampled) == infer(**sampled)
    text = infer(**GREEDY)
    stop = text[4:7]
    assert infer(**GREEDY, stop=stop) == text[: text.index(stop)]
    assert len(infer(max_tokens=1, temperature=0)) < len(text)


def check_structured(client, task):
    """What every text must look like is said in texts: the protocol's parameters are nothing else."""

    def infer(**parameters):
        parameters = {"temperature": 0.0, "max_tokens": 60, **parameters}
        tensor = text_input([TEXTS[0]])
        result = client.infer(task, [tensor], headers=headers(), parameters=parameters)
        return texts_of(result)[0]

    assert infer(choice='["a cat", "a dog"]') in ("a cat", "a dog")
    assert re.fullmatch("[a-z]{3}-[0-9]{2}", infer(regex="[a-z]{3}-[0-9]{2}"))
    assert isinstance(json.loads(infer(json_schema='{"type": "boolean"}')), bool)


def check_errors(client, task):
    def infer(name=task, tensor=None, headers=headers(), **fields):
        return client.infer(name, [tensor or text_input(["x"])], headers=dict(headers), **fields)

    refused("404", "nobody", lambda: infer("nobody"))
    refused("404", "nobody", lambda: client.get_model_metadata("nobody", headers=headers()))
    refused("400", "temperature", lambda: infer(parameters={"temperature": 9.0}))
    refused("400", "top_kk", lambda: infer(parameters={"top_kk": 1}))
    wrong = InferInput("text_input", [1], "INT32")
    wrong.set_data_from_numpy(np.array([1], dtype=np.int32))
    refused("400", "BYTES", lambda: infer(tensor=wrong))
    misnamed = InferInput("prompt", [1], "BYTES")
    misnamed.set_data_from_numpy(np.array(["x"], dtype=object))
    refused("400", "text_input", lambda: infer(tensor=misnamed))
    other = [InferRequestedOutput("logits")]
    refused("400", "text_output", lambda: infer(outputs=other))
    twice = [InferRequestedOutput("text_output")] * 2
    refused("400", "text_output", lambda: infer(outputs=twice))
    refused("401", "key", lambda: infer(headers={"authorization": "Bearer not-a-key"}))


def refused(status, word, call):
    try:
        call()
    except InferenceServerException as error:
        assert error.status() == status and word in error.message(), error
    else:
        raise AssertionError(f"{word} was not refused")


def check_generate(task):
    """The extension that has no client of its own: plain HTTP and server-sent events."""
    body = {"text_input": TEXTS[0], "parameters": {**GREEDY, "controls": {"words": 5}}}
    whole = fetch(f"/v2/models/{task}/generate", body)
    assert whole["model_name"] == task and whole["text_output"]
    frames = list(events(task, body))
    assert "".join(frame["text_output"] for frame in frames) == whole["text_output"]
    long = {"max_tokens": 200, "ignore_eos": True}
    with left_early():
        stream = events(task, {"text_input": TEXTS[0], "parameters": long})
        next(stream)
        stream.close()


def events(task, body):
    sent = {"authorization": BEARER, "content-type": "application/json"}
    url = f"{URL}/v2/models/{task}/generate_stream"
    request = urllib.request.Request(url, json.dumps(body).encode(), sent)
    with urllib.request.urlopen(request) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        for line in reply:
            if line.startswith(b"data:") and line.strip() != b"data: [DONE]":
                yield json.loads(line[5:])


def main():
    bundle, names = model(), tasks()
    with InferenceServerClient(URL.removeprefix("http://"), concurrency=4) as client:
        check_server(client, [bundle, *names])
        check_infer(client, names[0])
        check_parameters(client, names[0])
        check_structured(client, names[0])
        check_errors(client, names[0])
    check_generate(names[0])
    print(f"tritonclient {importlib.metadata.version('tritonclient')} over HTTP")


main()
