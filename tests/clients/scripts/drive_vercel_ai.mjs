// Vercel's AI SDK: generateText, streamText, generateObject, tools, with @ai-sdk/openai-compatible and @ai-sdk/openai.
import assert from "node:assert";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, stepCountIs, streamObject, streamText, tool } from "ai";
import { z } from "zod";

const baseURL = `${process.env.BASE}/v1`;
const compatible = createOpenAICompatible({ name: "lorafleet", baseURL, supportsStructuredOutputs: true, includeUsage: true });
const openai = createOpenAI({ baseURL, apiKey: "none" });
const prompt = "What colour is the sky?";
const schema = z.object({ name: z.enum(["Oslo", "Rome"]), size: z.number().int().min(1).max(9) });
const weather = tool({
  description: "Tells the weather",
  inputSchema: z.object({ city: z.enum(["Oslo", "Rome"]) }),
  execute: async ({ city }) => `Sun in ${city}`,
});

for (const model of [(name) => compatible(name), (name) => openai.chat(name), (name) => openai.responses(name)]) {
  const options = { temperature: 0 };
  assert.equal((await generateText({ model: model("shout"), prompt, ...options })).text, "THE SKY IS BLUE.");
  const stream = streamText({ model: model("shout"), prompt, ...options });
  let text = "";
  for await (const piece of stream.textStream) text += piece;
  assert.equal(text, "THE SKY IS BLUE.");
  assert.ok((await stream.usage).outputTokens > 0);
  schema.parse((await generateObject({ model: model("demo"), schema, prompt, ...options })).object);
  const objects = streamObject({ model: model("demo"), schema, prompt, ...options });
  let last;
  for await (const object of objects.partialObjectStream) last = object;
  schema.parse(last);
  const called = await generateText({
    model: model("demo"), prompt, tools: { weather }, toolChoice: { type: "tool", toolName: "weather" },
    stopWhen: stepCountIs(2), ...options,
  });
  assert.ok(called.steps[0].toolCalls[0].toolName === "weather");
  assert.ok(called.steps[0].toolResults[0].output.startsWith("Sun in"));
}
console.log("ok");
