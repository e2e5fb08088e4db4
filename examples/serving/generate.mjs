// Generate an image through `impasto serve` and watch it being denoised, with nothing but fetch (Node 18 or later).
//
//     impasto serve
//     node examples/serving/generate.mjs "a red cube on top of a blue sphere" out

import { mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';

const url = process.env.IMPASTO_URL ?? 'http://127.0.0.1:8000';
const key = process.env.IMPASTO_KEY ?? 'none';
const [prompt = 'a red cube on top of a blue sphere', folder = 'out'] = process.argv.slice(2);

/** Server-sent events of an answer, as { type, ... }. Lines that begin with a colon are comments. */
async function* events(body) {
  let text = '';
  for await (const piece of body.pipeThrough(new TextDecoderStream())) {
    const blocks = (text + piece).split('\n\n');
    text = blocks.pop();
    for (const block of blocks) {
      const data = block.split('\n').filter((line) => line.startsWith('data: ')).map((line) => line.slice(6));
      if (data.length) yield JSON.parse(data.join('\n'));
    }
  }
}

const answer = await fetch(`${url}/v1/images/generations`, {
  method: 'POST',
  headers: { 'Content-Type': 'application/json', Authorization: `Bearer ${key}` },
  body: JSON.stringify({ prompt, size: '256x256', seed: 7, stream: true, partial_images: 2 }),
});
if (!answer.ok) throw new Error(`${answer.status}: ${(await answer.json()).error.message}`);

await mkdir(folder, { recursive: true });
for await (const event of events(answer.body)) {
  if (event.type === 'error') throw new Error(event.error.message);
  const completed = event.type === 'image_generation.completed';
  const name = completed ? 'image.png' : `preview-${event.partial_image_index}.png`;
  await writeFile(join(folder, name), Buffer.from(event.b64_json, 'base64'));
  console.log(name);
}
