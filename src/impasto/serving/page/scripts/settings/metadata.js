// The settings inside an image file: the text "parameters" of a PNG, the EXIF user comment of a JPEG or WebP.
// https://www.w3.org/TR/png-3/#11textinfo, https://developers.google.com/speed/webp/docs/riff_container,
// https://exiv2.org/tags.html

const MOST_BYTES = 64 << 20;
const MOST_TEXT = 1 << 20;

/** The settings of a file as {prompt, negative, steps, ...}, or null if it has none. */
export async function readSettings(file) {
  if (file.size > MOST_BYTES) return null;
  const bytes = new Uint8Array(await file.arrayBuffer());
  const text = await textOf(bytes).catch(() => null);
  return text === null ? null : parse(text);
}

async function textOf(bytes) {
  const view = new DataView(bytes.buffer);
  if (view.getUint32(0) === 0x89504e47) return pngText(bytes, view);
  if (view.getUint16(0) === 0xffd8) return jpegText(bytes, view);
  if (latin(bytes, 0, 4) === "RIFF" && latin(bytes, 8, 12) === "WEBP") return webpText(bytes, view);
  return null;
}

const latin = (bytes, from, to) => String.fromCharCode(...bytes.subarray(from, to));

async function pngText(bytes, view) {
  for (let at = 8; at + 12 <= bytes.length; ) {
    const [size, kind] = [view.getUint32(at), latin(bytes, at + 4, at + 8)];
    const content = bytes.subarray(at + 8, at + 8 + size);
    const end = content.indexOf(0);
    if (["tEXt", "zTXt", "iTXt"].includes(kind) && latin(content, 0, end) === "parameters") {
      if (kind === "tEXt") return new TextDecoder("latin1").decode(content.subarray(end + 1));
      if (kind === "zTXt") return new TextDecoder("latin1").decode(await inflate(content.subarray(end + 2)));
      const compressed = content[end + 1] === 1;
      const language = content.indexOf(0, end + 3);
      const start = content.indexOf(0, language + 1) + 1; // after the translated keyword
      const text = content.subarray(start);
      return new TextDecoder().decode(compressed ? await inflate(text) : text);
    }
    at += 12 + size;
  }
  return null;
}

async function inflate(bytes) {
  const reader = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate")).getReader();
  const found = [];
  for (let total = 0; ; ) {
    const { value, done } = await reader.read();
    if (done) return new Uint8Array(await new Blob(found).arrayBuffer());
    total += value.length;
    if (total > MOST_TEXT) throw new RangeError("too much text");
    found.push(value);
  }
}

function jpegText(bytes, view) {
  for (let at = 2; at + 4 <= bytes.length && bytes[at] === 0xff && bytes[at + 1] !== 0xda; ) {
    if (bytes[at + 1] === 0xe1 && latin(bytes, at + 4, at + 8) === "Exif") return exifText(bytes.subarray(at + 10));
    at += 2 + view.getUint16(at + 2);
  }
  return null;
}

function webpText(bytes, view) {
  for (let at = 12; at + 8 <= bytes.length; ) {
    const size = view.getUint32(at + 4, true);
    if (latin(bytes, at, at + 4) === "EXIF") {
      const exif = bytes.subarray(at + 8, at + 8 + size);
      return exifText(latin(exif, 0, 4) === "Exif" ? exif.subarray(6) : exif);
    }
    at += 8 + size + (size % 2);
  }
  return null;
}

function exifText(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const little = view.getUint16(0) === 0x4949;
  const entry = (folder, tag) => {
    for (let i = 0; i < view.getUint16(folder, little); i++) {
      const at = folder + 2 + 12 * i;
      if (view.getUint16(at, little) === tag) return at;
    }
    return null;
  };
  const exif = entry(view.getUint32(4, little), 0x8769);
  const comment = exif === null ? null : entry(view.getUint32(exif + 8, little), 0x9286);
  if (comment === null) return null;
  const [size, start] = [view.getUint32(comment + 4, little), view.getUint32(comment + 8, little)];
  const [encoding, text] = [latin(bytes, start, start + 7), bytes.subarray(start + 8, start + size)];
  if (encoding !== "UNICODE") return new TextDecoder().decode(text);
  // The standard says big-endian; some programs follow the file's byte order.
  return new TextDecoder(text[0] === 0 || !little || !asciiFirst(text) ? "utf-16be" : "utf-16le").decode(text);
}

const asciiFirst = (text) => text.length > 1 && text[0] !== 0 && text[1] === 0;

// --- the form that image tools have in common: prompts, then one line of "Name: value" ---

const NEGATIVE = "Negative prompt: ";
const NEGATIVE_FROM = "Negative prompt from line";
// Other programs name adapters in the prompt. This API takes a list, and would read a tag as words.
const TAG = /<(?:lora|lyco):[^:<>]{1,200}(?::[^<>]{0,100})?>/gi;

export function parse(text) {
  const lines = text.replace(/\n+$/, "").split("\n");
  const last = lines.pop();
  if (last.length > 65536) return null;
  const entries = entriesOf(last);
  if (!/^\d+$/.test(entries.Steps ?? "")) return null;
  const marker = lines.findIndex((line) => line.startsWith(NEGATIVE)) + 1;
  const start = NEGATIVE_FROM in entries ? Number(entries[NEGATIVE_FROM]) : marker;
  const size = /^(\d+)x(\d+)$/.exec(entries.Size ?? "");
  const number = (name) => (/^-?\d+(\.\d+)?$/.test(entries[name] ?? "") ? Number(entries[name]) : null);
  const prompt = (start ? lines.slice(0, start - 1) : lines).join("\n");
  return {
    prompt: "Lora" in entries ? prompt.replace(TAG, "").trim() : prompt,
    negative: start ? lines.slice(start - 1).join("\n").slice(NEGATIVE.length) : "",
    steps: number("Steps"),
    guidance: number("CFG scale"),
    seed: /^\d+$/.test(entries.Seed ?? "") ? entries.Seed : null,
    width: size ? Number(size[1]) : null,
    height: size ? Number(size[2]) : null,
    model: entries.Model ?? null,
    sampler: entries.Sampler ?? null,
    adapters: adaptersOf(entries.Lora),
  };
}

/** "style 0.8; other 1" */
function adaptersOf(text = "") {
  const found = text.split("; ").map((part) => /^(.+) (-?[\d.]+)$/.exec(part)).filter(Boolean);
  return found.map(([, name, weight]) => ({ name, weight: Number(weight) }));
}

function entriesOf(line) {
  const found = Object.create(null);
  // Sticky: each entry begins where the last one ended, so the search is linear.
  const entry = /\s*([^:,"]+): ("(?:[^"\\]|\\.)*"|[^,]*)(?:, |$)/y;
  for (let match; entry.lastIndex < line.length && (match = entry.exec(line)); ) {
    try {
      found[match[1]] = match[2].startsWith('"') ? JSON.parse(match[2]) : match[2];
    } catch {
      return found;
    }
  }
  return found;
}
