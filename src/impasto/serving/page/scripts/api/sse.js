// Server-sent events of a fetch: https://html.spec.whatwg.org/multipage/server-sent-events.html

/** The data of each event of a response, as JSON; and steps, which are comments: {type: "progress", step, ...}. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      rest += value ?? "";
      const blocks = rest.split(/\r\n\r\n|\n\n|\r\r/);
      rest = done ? "" : blocks.pop();
      for (const block of blocks) {
        const step = /^: progress (\{.*\})$/m.exec(block);
        if (step) yield { type: "progress", ...JSON.parse(step[1]) };
        const data = dataOf(block);
        if (data === "[DONE]") return;
        if (data) yield JSON.parse(data);
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function dataOf(block) {
  return block
    .split(/\r\n|\n|\r/)
    .filter((line) => line.startsWith("data:"))
    .map((line) => line.slice(5).replace(/^ /, ""))
    .join("\n");
}
