// The AI SDK with its provider for OpenAI-compatible servers, against the server at RSGWM_URL.
import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";

let verification; // of a stream: on the chunk that ends it
const provider = createOpenAICompatible({
  name: "rsgwm",
  baseURL: process.env.RSGWM_URL,
  apiKey: "none",
  metadataExtractor: {
    extractMetadata: async ({ parsedBody }) => ({ rsgwm: { verification: parsedBody.verification } }),
    createStreamExtractor: () => ({
      processChunk: (chunk) => {
        verification = chunk.verification ?? verification;
      },
      buildMetadata: () => ({ rsgwm: { verification } }),
    }),
  },
});
const asked = {
  model: provider("checked"),
  prompt: "What is 2 + 2?",
  maxOutputTokens: 8,
  seed: 4,
  maxRetries: 0,
  providerOptions: { rsgwm: { verify: { attempts: 2, threshold: 1 } } },
};

const answer = await generateText(asked);
const verdict = answer.providerMetadata.rsgwm.verification.choices[0];
assert.equal(verdict.attempts, 2);
assert.equal(answer.response.body.verification.choices[0].score, verdict.score);
assert.equal(answer.response.headers["x-rsgwm-attempts"], "2");
assert.equal(answer.response.headers["x-rsgwm-accepted"], "false");

const stream = streamText(asked);
let text = "";
for await (const part of stream.textStream) text += part;
assert.ok(text);
assert.equal(text, answer.text);
assert.equal((await stream.providerMetadata).rsgwm.verification.choices[0].score, verdict.score);
console.log(`verification ${verdict.score.toFixed(6)}`);
