// openai for Node against a live server: node ask.mjs URL KEY MODEL MODE; prints what it found as JSON.
import OpenAI from "openai";

const [url, key, model, mode] = process.argv.slice(2);
const sent = new Set();
const spy = (address, init) => {
  for (const name of new Headers(init.headers).keys()) sent.add(name);
  return fetch(address, init);
};
const make = (more) => new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0, fetch: spy, ...more });
const client = make({});
const ask = { model, messages: [{ role: "user", content: "Hi" }], max_tokens: 4, temperature: 0 };
const status = async (call) => {
  try {
    await call();
    return 200;
  } catch (error) {
    return error.status;
  }
};
const create = (more, using = client, options = {}) => using.chat.completions.create({ ...ask, ...more }, options);

async function everything() {
  const whole = await create({});
  let streamed = "";
  for await (const chunk of await create({ stream: true })) streamed += chunk.choices[0].delta.content ?? "";
  let usage = null;
  const counted = await create({ stream: true, stream_options: { include_usage: true } });
  for await (const chunk of counted) usage = chunk.usage ?? usage;
  const schema = { type: "object", properties: { ok: { type: "boolean" } }, required: ["ok"] };
  const shaped = await create({
    max_tokens: 40,
    response_format: { type: "json_schema", json_schema: { name: "answer", schema } },
  });
  const statuses = [
    await status(() => create({ temperature: -1 })),
    await status(() => create({}, make({ apiKey: "wrong" }))),
    await status(() => create({ model: "gpt-5" })),
    await status(() => create({ messages: [{ role: "user", content: "x".repeat(1 << 20) }] })),
    await status(() => create({}, client, { headers: { "Content-Type": "text/plain" } })),
  ];
  const names = [...sent].join(",");
  const preflight = await fetch(`${url}/v1/chat/completions`, {
    method: "OPTIONS",
    headers: {
      Origin: "http://localhost:3000",
      "Access-Control-Request-Method": "POST",
      "Access-Control-Request-Headers": names,
    },
  });
  return {
    whole: whole.choices[0].message.content,
    streamed,
    usage,
    shaped: JSON.parse(shaped.choices[0].message.content),
    statuses,
    models: (await client.models.list()).data.map((one) => one.id),
    retrieved: (await client.models.retrieve(model)).id,
    embedded: (await client.embeddings.create({ model, input: "a" })).data[0].embedding.length,
    sent: [...sent],
    preflight: [preflight.status, preflight.headers.get("access-control-allow-headers")],
  };
}

async function refused() {
  const statuses = [await status(() => create({})), await status(() => create({}))];
  const started = performance.now();
  await create({}, make({ maxRetries: 2 }));
  return { statuses, waited: (performance.now() - started) / 1000 };
}

async function gone() {
  const stream = await create({ stream: true, max_tokens: 3000 });
  for await (const _chunk of stream) break; // leaving the loop aborts the request
  return {};
}

console.log(JSON.stringify(await { everything, refused, gone }[mode]()));
