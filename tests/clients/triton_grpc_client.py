"""NVIDIA's tritonclient over gRPC: KServe's Open Inference Protocol, with its streams."""

import importlib.metadata
import json
import queue
import re

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from shared import BEARER, GRPC, fetch, left_early, model, tasks

HEADERS = {"authorization": BEARER}
GREEDY = {"max_tokens": 12, "temperature": 0.0}
TEXTS = ["a fox in snow", "ein Bär", "東京"]


def text_input(texts):
    tensor = InferInput("text_input", [len(texts)], "BYTES")
    return tensor.set_data_from_numpy(np.array(texts, dtype=object))


def texts_of(result):
    return [text.decode() for text in result.as_numpy("text_output")]


def check_server(client, names):
    assert client.is_server_live(headers=HEADERS) and client.is_server_ready(headers=HEADERS)
    # Probes have no key.
    assert client.is_server_live() and client.is_server_ready()
    assert client.get_server_metadata(headers=HEADERS).name
    for name in names:
        assert client.is_model_ready(name, headers=HEADERS)
        described = client.get_model_metadata(name, headers=HEADERS)
        assert described.name == name
        inputs = {tensor.name: tensor.datatype for tensor in described.inputs}
        outputs = {tensor.name: tensor.datatype for tensor in described.outputs}
        assert inputs["text_input"] == outputs["text_output"] == "BYTES"


def check_infer(client, task):
    def infer(texts, **parameters):
        parameters = {**GREEDY, **parameters}
        return client.infer(
            task, [text_input(texts)], request_id="r-1", headers=HEADERS, parameters=parameters
        )

    result = infer(TEXTS)
    assert result.get_response().id == "r-1" and result.get_response().model_name == task
    texts = texts_of(result)
    assert all(texts) and texts == [texts_of(infer([text]))[0] for text in TEXTS]
    native = fetch(f"/v1/tasks/{task}/generate", {"input": TEXTS[0], **GREEDY})
    assert native["choices"][0]["text"] == texts[0]

    sampled = dict(temperature=1, seed=7)
    assert texts_of(infer(TEXTS, **sampled)) == texts_of(infer(TEXTS, **sampled))
    stop = texts[0][4:7]
    assert texts_of(infer(TEXTS[:1], stop=stop)) == [texts[0][: texts[0].index(stop)]]


class Stream:
    """The client's one stream: requests go in, what comes back is taken out in order."""

    def __init__(self, client):
        self.client, self.arrived = client, queue.Queue()
        client.start_stream(
            lambda result, error: self.arrived.put((result, error)), headers=HEADERS
        )

    def send(self, name, text, request_id, **parameters):
        self.client.async_stream_infer(
            name,
            [text_input([text])],
            request_id=request_id,
            parameters={**GREEDY, **parameters},
            enable_empty_final_response=True,
        )

    def next(self):
        return self.arrived.get(timeout=60)


def check_stream(client, task):
    """Several requests share a stream; each answer names its request, and an error ends only its own."""
    expected = texts_of(client.infer(task, [text_input(TEXTS)], headers=HEADERS, parameters=GREEDY))
    stream = Stream(client)
    for at, text in enumerate(TEXTS):
        stream.send(task, text, str(at))
    got, open_requests = [""] * len(TEXTS), len(TEXTS)
    while open_requests:
        result, error = stream.next()
        assert error is None, error
        response = result.get_response()
        if response.outputs:
            got[int(response.id)] += texts_of(result)[0]
        open_requests -= response.parameters["triton_final_response"].bool_param
    assert got == expected

    stream.send("nobody", TEXTS[0], "lost")
    result, error = stream.next()
    assert result is None and "nobody" in error.message()
    stream.send(task, TEXTS[0], "after")
    result, error = stream.next()
    assert error is None and result.get_response().id == "after"
    client.stop_stream()

    with left_early():
        stream = Stream(client)
        stream.send(task, TEXTS[0], "left", max_tokens=200, ignore_eos=True)
        stream.next()
        client.stop_stream(cancel_requests=True)


def check_structured(client, task):
    """What every text must look like is said in texts: the protocol's parameters are nothing else."""

    def infer(**parameters):
        parameters = {"temperature": 0.0, "max_tokens": 60, **parameters}
        tensor = text_input([TEXTS[0]])
        result = client.infer(task, [tensor], headers=HEADERS, parameters=parameters)
        return texts_of(result)[0]

    assert infer(choice='["a cat", "a dog"]') in ("a cat", "a dog")
    assert re.fullmatch("[a-z]{3}-[0-9]{2}", infer(regex="[a-z]{3}-[0-9]{2}"))
    assert isinstance(json.loads(infer(json_schema='{"type": "boolean"}')), bool)


def check_errors(client, task):
    def infer(name=task, tensor=None, headers=HEADERS, **fields):
        return client.infer(name, [tensor or text_input(["x"])], headers=headers, **fields)

    refused("NOT_FOUND", "nobody", lambda: infer("nobody"))
    refused("NOT_FOUND", "nobody", lambda: client.get_model_metadata("nobody", headers=HEADERS))
    refused("INVALID_ARGUMENT", "temperature", lambda: infer(parameters={"temperature": 9.0}))
    refused("INVALID_ARGUMENT", "top_kk", lambda: infer(parameters={"top_kk": 1}))
    wrong = InferInput("text_input", [1], "INT32")
    wrong.set_data_from_numpy(np.array([1], dtype=np.int32))
    refused("INVALID_ARGUMENT", "BYTES", lambda: infer(tensor=wrong))
    twice = [InferRequestedOutput("text_output")] * 2
    refused("INVALID_ARGUMENT", "text_output", lambda: infer(outputs=twice))
    refused("UNAUTHENTICATED", "key", lambda: infer(headers=None))
    long = {"max_tokens": 200, "ignore_eos": True}
    refused("DEADLINE_EXCEEDED", "", lambda: infer(parameters=long, client_timeout=0.001))


def refused(status, word, call):
    try:
        call()
    except InferenceServerException as error:
        assert error.status() == f"StatusCode.{status}" and word in error.message(), error
    else:
        raise AssertionError(f"{word} was not refused")


def main():
    bundle, names = model(), tasks()
    with InferenceServerClient(GRPC) as client:
        check_server(client, [bundle, *names])
        check_infer(client, names[0])
        check_structured(client, names[0])
        check_stream(client, names[0])
        check_errors(client, names[0])
    print(f"tritonclient {importlib.metadata.version('tritonclient')} over gRPC")


main()
