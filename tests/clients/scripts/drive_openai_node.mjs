// openai for node: chats and adapters, streams, tools, parsed output, Responses, errors.
import assert from "node:assert";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: `${process.env.BASE}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What colour is the sky?" }];
const City = z.object({ name: z.enum(["Oslo", "Rome"]), size: z.number().int().min(1).max(9) });

const shouted = await client.chat.completions.create({ model: "shout", messages, temperature: 0 });
assert.equal(shouted.choices[0].message.content, "THE SKY IS BLUE.");
const { request_id } = await client.chat.completions.create({ model: "shout", messages }).withResponse();
assert.ok(request_id && !request_id.includes(","), `request id ${request_id}`);

let text = "", usage;
const options = { model: "demo", messages, temperature: 0, stream: true, stream_options: { include_usage: true } };
for await (const chunk of await client.chat.completions.create(options)) {
  text += chunk.choices[0]?.delta.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, "The sky is blue.");
assert.ok(usage.completion_tokens > 0);

const parsed = await client.chat.completions.parse({
  model: "demo", messages, response_format: zodResponseFormat(City, "city"),
});
City.parse(parsed.choices[0].message.parsed);

const runner = client.chat.completions.runTools({
  model: "demo", messages, tool_choice: { type: "function", function: { name: "weather" } },
  tools: [{
    type: "function",
    function: {
      name: "weather", parse: JSON.parse, function: ({ city }) => `Sun in ${city}`,
      parameters: { type: "object", properties: { city: { enum: ["Oslo", "Rome"] } }, required: ["city"], additionalProperties: false },
    },
  }],
}, { maxChatCompletions: 2 });
const called = await runner.finalFunctionToolCall();
assert.ok(["Oslo", "Rome"].includes(JSON.parse(called.arguments).city));

const response = await client.responses.create({ model: "shout", input: "What colour is the sky?", temperature: 0 });
assert.equal(response.output_text, "THE SKY IS BLUE.");
let streamed = "";
for await (const event of await client.responses.create({ model: "shout", input: "What colour is the sky?", temperature: 0, stream: true }))
  if (event.type === "response.output_text.delta") streamed += event.delta;
assert.equal(streamed, "THE SKY IS BLUE.");
assert.equal((await client.embeddings.create({ model: "demo", input: ["a", "b"] })).data.length, 2);
assert.ok((await client.models.list()).data.some((model) => model.id === "shout"));
await assert.rejects(client.chat.completions.create({ model: "nobody", messages }), OpenAI.NotFoundError);
console.log("ok");
