// Asks the server: an answer as it comes, and errors in words.

export class Refused extends Error {}

/** Why a request failed, for a reader. */
async function refusal(response) {
  let message = response.statusText;
  try {
    message = (await response.json()).error.message;
  } catch { /* No JSON: the status alone. */ }
  const wait = response.headers.get("Retry-After");
  const hint = response.status === 401 ? " Enter the API key in the settings."
    : wait ? ` The server asks to wait ${wait} s.` : "";
  return new Refused(`${response.status}: ${message}.${hint}`);
}

/** Headers with the key, if there is one. */
export function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** Each chunk of a chat's stream. Throws what `signal` or the network ended it by. */
export async function* chat(body, key, signal) {
  const response = await fetch("v1/chat/completions", {
    method: "POST", signal, body: JSON.stringify(body),
    headers: { "Content-Type": "application/json", ...headers(key) },
  });
  if (!response.ok) throw await refusal(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Refused("The connection ended before the answer did.");
    waiting += value;
    const events = waiting.split("\n\n");
    waiting = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue;
      const data = event.slice(6);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refused(chunk.error.message);
      yield chunk;
    }
  }
}

/** GET a path as JSON; null where that fails. */
export async function get(path, key) {
  try {
    const response = await fetch(path, { headers: headers(key) });
    return response.ok ? await response.json() : null;
  } catch {
    return null;
  }
}
