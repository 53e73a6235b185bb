"""Shoal's own gRPC service by grpcio alone: messages come by reflection, as grpcurl gets them."""

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message_factory import GetMessageClass
from grpc import StatusCode
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from grpc_reflection.v1alpha.reflection_pb2 import (
    ServerReflectionRequest,
    ServerReflectionResponse,
)

from shared import BEARER, GREEDY, GRPC, fetch, left_early, model, tasks

SERVICES = ["shoal.v1.Shoal", "inference.GRPCInferenceService"]


class Keyed(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Adds the key to every call."""

    def intercept(self, proceed, details, request):
        metadata = [*(details.metadata or []), ("authorization", BEARER)]
        return proceed(details._replace(metadata=metadata), request)

    intercept_unary_unary = intercept_unary_stream = intercept_stream_stream = intercept


class Service:
    """A gRPC service whose methods take and give dictionaries."""

    def __init__(self, channel, described):
        for method in described.methods:
            kind = channel.unary_stream if method.server_streaming else channel.unary_unary
            request, reply = (GetMessageClass(t) for t in (method.input_type, method.output_type))
            call = kind(
                f"/{described.full_name}/{method.name}",
                request_serializer=lambda fields, of=request: ParseDict(
                    fields, of()
                ).SerializeToString(),
                response_deserializer=lambda data, of=reply: as_dict(of.FromString(data)),
            )
            setattr(self, method.name, call)


def as_dict(message):
    return MessageToDict(message, preserving_proto_field_name=True)


def check_reflection(channel):
    """Both versions of reflection name the same services; version 1 has the messages of its draft."""

    def services(version):
        ask = channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=ServerReflectionRequest.SerializeToString,
            response_deserializer=ServerReflectionResponse.FromString,
        )
        replies = ask(iter([ServerReflectionRequest(list_services="")]))
        return {s.name for s in next(replies).list_services_response.service}

    assert services("v1") >= {*SERVICES, "grpc.health.v1.Health"}
    assert services("v1alpha") == services("v1")


def check_health(channel):
    # Probes need no key.
    health = HealthStub(channel)
    for name in ["", *SERVICES]:
        assert health.Check(HealthCheckRequest(service=name)).status == HealthCheckResponse.SERVING
        watch = health.Watch(HealthCheckRequest(service=name))
        assert next(watch).status == HealthCheckResponse.SERVING
        watch.cancel()
    refused(StatusCode.NOT_FOUND, "", lambda: health.Check(HealthCheckRequest(service="nobody")))


def check_tasks(shoal):
    listed = shoal.ListTasks({})["data"]
    native = fetch("/v1/tasks")["data"]
    assert [task["id"] for task in listed] == [task["id"] for task in native]
    assert [task["description"] for task in listed] == [task["description"] for task in native]


def check_whole(shoal, bundle, task):
    request = {"task": task, "input": "a fox in snow", **GREEDY}
    named = [("x-request-id", "from-grpc")]
    reply, call = shoal.GenerateOnce.with_call(request, metadata=named)
    sent_back = dict([*call.initial_metadata(), *call.trailing_metadata()])
    assert sent_back["x-request-id"] == "from-grpc"
    assert reply["task"] == task and reply["model"] == bundle and reply["id"]
    [choice] = reply["choices"]
    assert choice["finish_reason"] in ("stop", "length")
    assert choice["words"] == len(choice["text"].split()) > 0

    native = fetch(f"/v1/tasks/{task}/generate", {"input": "a fox in snow", **GREEDY})
    assert choice["text"] == native["choices"][0]["text"] and reply["usage"] == native["usage"]

    steered = {**request, "controls": {"words": 5}, "max_tokens": 40}
    native = fetch(f"/v1/tasks/{task}/generate", {k: v for k, v in steered.items() if k != "task"})
    once = shoal.GenerateOnce(steered)
    assert once["choices"][0]["text"] == native["choices"][0]["text"]

    sampled = {**request, "n": 3, "seed": 7, "temperature": 1.0, "stop": ["a"]}
    first, again = (shoal.GenerateOnce(sampled) for _ in range(2))
    assert [c.get("index", 0) for c in first["choices"]] == [0, 1, 2]
    assert first["choices"] == again["choices"]


def check_stream(shoal, task):
    request = {"task": task, "input": "a fox in snow", **GREEDY}
    whole = shoal.GenerateOnce(request)
    frames = list(shoal.Generate(request))
    choices = [choice for frame in frames for choice in frame.get("choices", [])]
    assert "".join(choice.get("text", "") for choice in choices) == whole["choices"][0]["text"]
    reasons = [choice.get("finish_reason", "") for choice in choices]
    assert reasons == [""] * (len(choices) - 1) + [whole["choices"][0]["finish_reason"]]
    assert frames[-1]["usage"] == whole["usage"]
    assert len({frame["id"] for frame in frames}) == 1

    pending = [shoal.GenerateOnce.future(request) for _ in range(16)]
    texts = {answer.result()["choices"][0]["text"] for answer in pending}
    assert texts == {whole["choices"][0]["text"]}


def check_score(shoal, task):
    """Scores are the same as over HTTP, and add up to one."""
    request = {"input": "a fox in snow", "labels": ["a red fox", "a blue car"]}
    scored = shoal.Score({"task": task, **request})
    native = fetch(f"/v1/tasks/{task}/score", request)
    assert [s["label"] for s in scored["scores"]] == request["labels"]
    for ours, theirs in zip(scored["scores"], native["scores"]):
        assert abs(ours["logprob"] - theirs["logprob"]) < 1e-4
    assert abs(sum(s["probability"] for s in scored["scores"]) - 1) < 1e-4


def check_errors(shoal, task):
    def ask(timeout=None, **fields):
        return shoal.GenerateOnce({"task": task, "input": "x", **fields}, timeout=timeout)

    def stream(**fields):
        return list(shoal.Generate({"task": task, "input": "x", **fields}))

    for call in (ask, stream):
        refused(StatusCode.NOT_FOUND, "nobody", lambda: call(task="nobody"))
        refused(StatusCode.INVALID_ARGUMENT, "temperature", lambda: call(temperature=9))
        bad_control = {"no_such_control": 1}
        refused(StatusCode.INVALID_ARGUMENT, "no_such_control", lambda: call(controls=bad_control))
        refused(StatusCode.INVALID_ARGUMENT, "words", lambda: call(controls={"words": 1000}))
        refused(StatusCode.OUT_OF_RANGE, "", lambda: call(max_tokens=10**6))
    refused(StatusCode.DEADLINE_EXCEEDED, "", lambda: ask(timeout=0.001, max_tokens=200))


def check_keys(stranger, task):
    def ask(metadata=None):
        return stranger.GenerateOnce({"task": task, "input": "x"}, metadata=metadata)

    refused(StatusCode.UNAUTHENTICATED, "key", ask)
    refused(StatusCode.UNAUTHENTICATED, "key", lambda: ask([("authorization", "Bearer x")]))
    refused(StatusCode.UNAUTHENTICATED, "key", lambda: list(stranger.Generate({"task": task})))


def check_leaving(shoal, task):
    with left_early():
        request = {"task": task, "input": "a fox", "max_tokens": 150, "n": 4, "temperature": 1.5}
        stream = shoal.Generate(request)
        next(stream)
        stream.cancel()
        refused(StatusCode.CANCELLED, "", lambda: list(stream))


def refused(code, word, call):
    try:
        call()
    except grpc.RpcError as error:
        assert error.code() is code and word in error.details(), error
    else:
        raise AssertionError(f"{word} was not refused as {code}")


def main():
    bundle, [task, *_] = model(), tasks()
    with grpc.insecure_channel(GRPC) as channel:
        keyed = grpc.intercept_channel(channel, Keyed())
        check_health(channel)
        check_reflection(keyed)
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(keyed))
        described = pool.FindServiceByName("shoal.v1.Shoal")
        shoal = Service(keyed, described)
        check_keys(Service(channel, described), task)
        check_tasks(shoal)
        check_whole(shoal, bundle, task)
        check_stream(shoal, task)
        check_score(shoal, task)
        check_errors(shoal, task)
        check_leaving(shoal, task)
    print(f"grpcio {grpc.__version__}: reflection, health, {task}")


main()
