// The page: what its controls do.

import { grow, load, markdown, openCalls, save } from "./conversation.js";
import { resultForm, show } from "./messages.js";
import { chat, get } from "./stream.js";

const at = (id) => document.getElementById(id);
const SETTINGS = "apertus-mlx settings", KEY = "apertus-mlx key";
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const fields = at("fields").elements;
let messages = load();
let running = null;

function stored(name) {
  try { return sessionStorage.getItem(name) ?? ""; } catch { return ""; }
}

function store(name, value) {
  try { sessionStorage.setItem(name, value); } catch { /* It is lost at a reload. */ }
}

function settings() {
  return Object.fromEntries([...NUMBERS, "system", "think", "tools"].map(
    (name) => [name, fields[name].value]));
}

function requestBody() {
  const given = settings();
  const system = given.system ? [{ role: "system", content: given.system }] : [];
  const body = {
    model: "default", stream: true, stream_options: { include_usage: true },
    messages: [...system, ...messages],
  };
  for (const name of NUMBERS) if (given[name] !== "") body[name] = Number(given[name]);
  if (given.think) body.reasoning_effort = given.think;
  if (given.tools.trim()) {
    try {
      body.tools = JSON.parse(given.tools);
    } catch (error) {
      throw new Error(`Tools in the settings are not JSON: ${error.message}`);
    }
  }
  return body;
}

function draw() {
  at("messages").replaceChildren(...messages.map((each) => show(each)));
  const calls = running ? [] : openCalls(messages);
  if (calls.length) {
    const form = resultForm(calls, (results) => { messages.push(...results); answer(); });
    at("messages").append(form);
  }
  at("send").disabled = running !== null || calls.length > 0;
  at("stop").disabled = running === null;
  at("new").disabled = running !== null;
}

function fail(error) {
  at("error-text").textContent = error instanceof TypeError
    ? "The server cannot be reached." : error.message;
  at("error").hidden = false;
  at("retry").focus();
}

function bytes(count) {
  return count < 2 ** 30 ? `${(count / 2 ** 20).toFixed(1)} MiB` : `${(count / 2 ** 30).toFixed(1)} GiB`;
}

async function showFigures(usage, seconds) {
  const parts = [];
  if (usage) {
    const rate = seconds > 0 ? `, ${((usage.completion_tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
    parts.push(`${usage.completion_tokens} tokens${rate}`,
      `prompt ${usage.prompt_tokens}, ${usage.prompt_tokens_details.cached_tokens} of them kept`);
  }
  const status = await get("v1/status", at("key").value);
  if (status) {
    parts.push(`${bytes(status.engine.prefix_bytes)} kept of at most ${bytes(status.memory_limit_bytes)}`);
    at("model").textContent = status.model.id;
  }
  at("figures").value = parts.join(" · ");
}

async function answer() {
  if (running) return;
  at("error").hidden = true;
  at("finished").textContent = "";
  running = new AbortController();
  draw();
  at("text").focus();
  const message = { role: "assistant", content: "" };
  let shown = null, begun = 0, ended = 0, usage = null;
  try {
    for await (const chunk of chat(requestBody(), at("key").value, running.signal)) {
      usage = chunk.usage ?? usage;
      if (!chunk.choices.length) continue;
      begun ||= performance.now();
      ended = performance.now();
      grow(message, chunk.choices[0].delta);
      const main = document.querySelector("main");
      const atEnd = main.scrollHeight - main.scrollTop - main.clientHeight < 60;
      const made = show(message, shown);
      if (!shown) at("messages").append(made);
      shown = made;
      if (atEnd) main.scrollTop = main.scrollHeight;
    }
    if (message.content || message.tool_calls || message.reasoning_content) messages.push(message);
    at("finished").textContent = message.tool_calls
      ? `Calls ${message.tool_calls.map((each) => each.function.name).join(", ")}`
      : message.content || "The answer is empty.";
  } catch (error) {
    if (running.signal.aborted) {
      // A call that was cut has no end: what was said before it stays.
      delete message.tool_calls;
      if (message.content) messages.push(message);
      at("finished").textContent = "Stopped.";
    } else {
      fail(error);
    }
  }
  running = null;
  if (!save(messages)) at("finished").textContent += " There is no room to keep the conversation.";
  draw();
  await showFigures(usage, (ended - begun) / 1000);
}

function send() {
  const text = at("text").value.trim();
  if (!text || at("send").disabled) return;
  messages.push({ role: "user", content: text });
  save(messages);
  at("text").value = "";
  answer();
}

function download(name, type, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

at("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
at("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
at("stop").addEventListener("click", () => { running?.abort(); at("text").focus(); });
at("retry").addEventListener("click", () => answer());
at("new").addEventListener("click", () => {
  messages = [];
  save(messages);
  at("error").hidden = true;
  at("finished").textContent = "";
  at("figures").value = "";
  draw();
  at("text").focus();
});
at("export-json").addEventListener("click", () => {
  const text = JSON.stringify({ settings: settings(), messages }, null, 2);
  download("conversation.json", "application/json", text);
});
at("export-markdown").addEventListener("click", () => {
  download("conversation.md", "text/markdown", markdown(messages));
});
at("fields").addEventListener("submit", (event) => event.preventDefault());
at("fields").addEventListener("input", () => {
  store(SETTINGS, JSON.stringify(settings()));
  store(KEY, at("key").value);
});

try {
  for (const [name, value] of Object.entries(JSON.parse(stored(SETTINGS) || "{}"))) {
    if (fields[name]) fields[name].value = value;
  }
} catch { /* As if nothing were stored. */ }
at("key").value = stored(KEY);
draw();
showFigures(null, 0);
