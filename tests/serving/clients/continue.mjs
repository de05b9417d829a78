// Continue's adapter for OpenAI-compatible servers against the server at RSGWM_URL.
import assert from "node:assert/strict";
import { constructLlmApi } from "@continuedev/openai-adapters";

const api = constructLlmApi({ provider: "openai", apiBase: `${process.env.RSGWM_URL}/`, apiKey: "none" });
const messages = [{ role: "user", content: "What is 2 + 2?" }];
const asked = { model: "checked", messages, max_tokens: 8, seed: 4, verify: { attempts: 2, threshold: 1 } };
const { signal } = new AbortController();

const answer = await api.chatCompletionNonStream({ ...asked, stream: false }, signal);
const verdict = answer.verification.choices[0];
assert.equal(verdict.attempts, 2);

let text = "";
let last;
for await (const chunk of api.chatCompletionStream({ ...asked, stream: true }, signal)) {
  text += chunk.choices[0]?.delta.content ?? "";
  last = chunk.verification ? chunk : last;
}
assert.ok(text);
assert.equal(text, answer.choices[0].message.content);
assert.equal(last.verification.choices[0].score, verdict.score);
console.log(`verification ${verdict.score.toFixed(6)}`);
