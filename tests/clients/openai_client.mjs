// OpenAI's client for Node, used as its documentation says, with nothing adapted.

import assert from "node:assert/strict";
import OpenAI from "openai";

const [url, , key] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0, timeout: 120_000 });
const messages = [{ role: "user", content: "a fox in snow" }];
const greedy = { temperature: 0, max_tokens: 12 };

async function checkModels() {
  const models = [];
  for await (const model of client.models.list()) models.push(model);
  const bundle = models.find((model) => !model.parent);
  const tasks = models.filter((model) => model.parent === bundle.id);
  assert.ok(tasks.length > 0);
  assert.deepEqual(await client.models.retrieve(bundle.id), bundle);
  return [bundle.id, tasks.map((task) => task.id)];
}

async function checkCompletion(model) {
  const request = { model, prompt: "a fox in snow", ...greedy };
  const whole = await client.completions.create(request);
  addsUp(whole.usage);
  let text = "";
  for await (const chunk of await client.completions.create({ ...request, stream: true })) {
    text += chunk.choices[0].text;
  }
  assert.equal(text, whole.choices[0].text);
}

async function checkChat(model) {
  const request = { model, messages, ...greedy };
  const { data: whole, response } = await client.chat.completions
    .create(request, { headers: { "x-request-id": "from-node" } })
    .withResponse();
  assert.equal(response.headers.get("x-request-id"), "from-node");
  addsUp(whole.usage);
  const { role, content } = whole.choices[0].message;
  assert.equal(role, "assistant");
  assert.ok(content.length > 0);

  const options = { stream: true, stream_options: { include_usage: true } };
  const chunks = [];
  for await (const chunk of await client.chat.completions.create({ ...request, ...options })) {
    chunks.push(chunk);
  }
  const last = chunks.pop();
  assert.deepEqual([last.choices, last.usage], [[], whole.usage]);
  assert.equal(chunks[0].choices[0].delta.role, "assistant");
  assert.equal(chunks.map((chunk) => chunk.choices[0].delta.content ?? "").join(""), content);
  assert.equal(chunks.at(-1).choices[0].finish_reason, whole.choices[0].finish_reason);

  const runner = client.chat.completions.stream(request);
  assert.equal(await runner.finalContent(), content);
}

/** A reply goes back as it came. A task takes one message, and that is all that is wrong with it. */
async function checkTurns(model) {
  const reply = await client.chat.completions.create({ model, messages, ...greedy });
  const turns = [...messages, reply.choices[0].message, ...messages];
  const call = () => client.chat.completions.create({ model, messages: turns, ...greedy });
  await refused(OpenAI.BadRequestError, "messages", call, "one user message");
}

async function checkLogprobs(model) {
  const options = { logprobs: true, top_logprobs: 2 };
  const reply = await client.chat.completions.create({ model, messages, ...greedy, ...options });
  const { message, logprobs } = reply.choices[0];
  const bytes = logprobs.content.flatMap((token) => token.bytes);
  assert.equal(Buffer.from(bytes).toString(), message.content);
  for (const { token, logprob, top_logprobs } of logprobs.content) {
    assert.ok(logprob <= 0 && top_logprobs.length === 2 && top_logprobs[0].token === token);
  }
}

async function checkStructured(model) {
  const choice = ["a cat", "a dog"];
  const chosen = await client.chat.completions.create({ model, messages, choice });
  assert.ok(choice.includes(chosen.choices[0].message.content));
  const schema = {
    type: "object",
    properties: { mood: { enum: ["calm", "tense"] }, snow: { type: "boolean" } },
    required: ["mood", "snow"],
    additionalProperties: false,
  };
  const reply = await client.chat.completions.parse({
    ...{ model, messages, temperature: 0, max_tokens: 100 },
    response_format: { type: "json_schema", json_schema: { name: "scene", strict: true, schema } },
  });
  const { mood, snow } = reply.choices[0].message.parsed;
  assert.ok(["calm", "tense"].includes(mood) && typeof snow === "boolean");
}

async function checkErrors(bundle, task) {
  const chat = (fields) => client.chat.completions.create({ model: task, messages, ...fields });
  await refused(OpenAI.NotFoundError, "model", () => chat({ model: "nobody" }));
  await refused(OpenAI.NotFoundError, "model", () => chat({ model: "nobody", stream: true }));
  await refused(OpenAI.BadRequestError, "temperature", () => chat({ temperature: 9 }));
  await refused(OpenAI.BadRequestError, "top_kk", () => chat({ top_kk: 1 }));
  await refused(OpenAI.BadRequestError, "controls.words", () => chat({ controls: { words: 1000 } }));
  const stranger = client.withOptions({ apiKey: "not-a-key" });
  await refused(OpenAI.AuthenticationError, null, () => stranger.models.list());
}

async function checkLeaving(model) {
  const before = await cancelled();
  const long = { max_tokens: 150, n: 4, ignore_eos: true, stream: true };
  for await (const _ of await client.chat.completions.create({ model, messages, ...long })) break;
  const end = Date.now() + 10_000;
  while ((await cancelled()) !== before + 1) {
    assert.ok(Date.now() < end, "the server did not notice that its client had left");
  }
}

/** How many requests the server has counted as left by their clients. */
async function cancelled() {
  const reply = await fetch(`${url}/metrics`, { headers: { authorization: `Bearer ${key}` } });
  const series = (await reply.text()).matchAll(
    /^shoal_requests_total\{.*outcome="cancelled".*\} (\d+)$/gm,
  );
  return [...series].reduce((sum, [, value]) => sum + Number(value), 0);
}

async function refused(kind, param, call, words = "") {
  await assert.rejects(call, (error) => {
    assert.equal(error.constructor, kind);
    assert.equal(error.param ?? null, param);
    assert.ok(error.requestID.length > 0);
    return error.message.length > 0 && error.message.includes(words);
  });
}

function addsUp({ prompt_tokens, completion_tokens, total_tokens }) {
  assert.ok(prompt_tokens > 0 && completion_tokens > 0);
  assert.equal(total_tokens, prompt_tokens + completion_tokens);
}

const [bundle, tasks] = await checkModels();
for (const model of [bundle, ...tasks]) await checkCompletion(model);
for (const task of tasks) await checkChat(task);
await checkTurns(tasks[0]);
await checkLogprobs(tasks[0]);
await checkStructured(tasks[0]);
await checkErrors(bundle, tasks[0]);
await checkLeaving(tasks[0]);
console.log(`openai for Node: ${bundle} and ${tasks.length} tasks`);
