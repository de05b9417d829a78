// OpenAI's client for Node against the server at RSGWM_URL.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.env.RSGWM_URL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is 2 + 2?" }];
const asked = { model: "checked", messages, max_tokens: 8, seed: 4, verify: { attempts: 2, threshold: 1 } };

const names = (await client.models.list()).data.map((model) => model.id);
assert.ok(names.includes("sums") && names.includes("checked"));

const { data, response } = await client.chat.completions.create(asked).withResponse();
const verdict = data.verification.choices[0];
assert.equal(verdict.attempts, 2);
assert.equal(response.headers.get("x-rsgwm-attempts"), "2");
assert.equal(response.headers.get("x-rsgwm-accepted"), "false");

let text = "";
let last;
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) {
  text += chunk.choices[0]?.delta.content ?? "";
  last = chunk;
}
assert.ok(text);
assert.equal(text, data.choices[0].message.content);
assert.equal(last.verification.choices[0].score, verdict.score);

await assert.rejects(client.chat.completions.create({ model: "nobody", messages }), (error) => {
  return error.status === 404 && error.code === "model_not_found";
});
console.log(`verification ${verdict.score.toFixed(6)}`);
