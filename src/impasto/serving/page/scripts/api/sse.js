// Server-sent events of a fetch: https://html.spec.whatwg.org/multipage/server-sent-events.html

const BETWEEN = /\r\n\r\n|\n\n|\r\r/;

/** The data of each event of a response, as JSON; and steps, which are comments: {type: "progress", step, ...}. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let parts = []; // of a block that has not ended
  let tail = ""; // their last characters, in which a separator may begin
  try {
    for (;;) {
      const { value = "", done } = await reader.read();
      parts.push(value);
      // An image comes in hundreds of parts. Time would grow with their square if each one meant to search all again.
      if (!done && !BETWEEN.test(tail + value)) {
        tail = (tail + value).slice(-3);
        continue;
      }
      const blocks = parts.join("").split(BETWEEN);
      parts = done ? [] : [blocks.pop()];
      tail = (parts[0] ?? "").slice(-3);
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
