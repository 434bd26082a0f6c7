// Shows messages. What a model wrote is only ever set as text, never read as HTML.

const NAMES = { user: "You", assistant: "Assistant", tool: "Result" };

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** Text, with fenced code in blocks of its own. */
function paragraphs(text) {
  return text.split(/^(```[^\n]*\n[\s\S]*?(?:^```[ \t]*$|$(?![\s\S])))/m).map((part) => {
    if (!part.startsWith("```")) return element("div", "text", part.trim());
    const code = part.replace(/^```[^\n]*\n/, "").replace(/^```[ \t]*$/m, "");
    const block = element("pre");
    block.tabIndex = 0;
    block.append(element("code", "", code));
    return block;
  });
}

function details(summary, className, text, open) {
  const folded = element("details");
  folded.open = open;
  folded.append(element("summary", "", summary), element("div", className, text));
  return folded;
}

/** A message; `old` is what showed it before. */
export function show(message, old) {
  const article = element("article", message.role);
  article.setAttribute("aria-label", NAMES[message.role] ?? message.role);
  article.append(element("p", "role", NAMES[message.role] ?? message.role));
  if (message.reasoning_content) {
    const open = old?.querySelector("details")?.open ?? false;
    article.append(details("Thoughts", "thought", message.reasoning_content, open));
  }
  article.append(...paragraphs(message.content ?? ""));
  for (const { function: call } of message.tool_calls ?? []) {
    article.append(details(`Calls ${call.name}`, "arguments", call.arguments, true));
  }
  if (old) old.replaceWith(article);
  return article;
}

/** A form for the results of calls. */
export function resultForm(calls, onResults) {
  const form = element("form", "results");
  for (const call of calls) {
    const label = element("label", "", `Result of ${call.function.name}`);
    const field = element("textarea");
    field.name = call.id;
    field.rows = 2;
    label.append(field);
    form.append(label);
  }
  const button = element("button", "", "Send results");
  form.append(button);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    onResults(calls.map((call) => ({
      role: "tool", tool_call_id: call.id, content: form.elements[call.id].value,
    })));
  });
  return form;
}
