// The messages of a conversation: kept over a reload, grown by a stream, exported.

const PLACE = "apertus-mlx conversation";

/** The messages of this tab, or none. */
export function load() {
  try {
    const found = JSON.parse(sessionStorage.getItem(PLACE));
    return Array.isArray(found) ? found : [];
  } catch {
    return [];
  }
}

/** Keep the messages until the tab closes; returns whether there was room. */
export function save(messages) {
  try {
    sessionStorage.setItem(PLACE, JSON.stringify(messages));
    return true;
  } catch {
    return false;
  }
}

/** Add what a chunk brings to the assistant's message. */
export function grow(message, delta) {
  message.content += delta.content ?? "";
  if (delta.reasoning_content) {
    message.reasoning_content = (message.reasoning_content ?? "") + delta.reasoning_content;
  }
  for (const part of delta.tool_calls ?? []) {
    message.tool_calls ??= [];
    const call = message.tool_calls[part.index] ??= {
      id: part.id, type: "function", function: { name: "", arguments: "" },
    };
    call.function.name += part.function.name ?? "";
    call.function.arguments += part.function.arguments ?? "";
  }
}

/** Calls of the last message that have no result yet. */
export function openCalls(messages) {
  const last = messages.findLastIndex((each) => each.role === "assistant");
  const results = messages.slice(last + 1).map((each) => each.tool_call_id);
  const calls = last < 0 ? [] : messages[last].tool_calls ?? [];
  return calls.filter((each) => !results.includes(each.id));
}

/** A fence longer than any run of backticks in `text`. */
function fenced(text, language = "") {
  const runs = text.match(/`+/g) ?? [];
  const fence = "`".repeat(Math.max(3, ...runs.map((each) => each.length + 1)));
  return `${fence}${language}\n${text}\n${fence}`;
}

/** The conversation as Markdown. */
export function markdown(messages) {
  return messages.map((each) => [
    `## ${each.role}`,
    ...(each.reasoning_content ? ["Thought:", fenced(each.reasoning_content)] : []),
    ...(each.content ? [each.role === "tool" ? fenced(each.content) : each.content] : []),
    ...(each.tool_calls ?? []).flatMap(({ function: call }) =>
      [`Calls ${call.name}:`, fenced(call.arguments, "json")]),
  ].join("\n\n")).join("\n\n") + "\n";
}
