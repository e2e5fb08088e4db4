// Generate and edit through `impasto serve` with OpenAI's own client for JavaScript.
//
//     npm install openai
//     impasto serve --alias dall-e-3=scenes
//     node examples/serving/openai_client.mjs "a red cube on top of a blue sphere" out

import { mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import OpenAI, { toFile } from 'openai';

const [prompt = 'a red cube on top of a blue sphere', folder = 'out'] = process.argv.slice(2);
const client = new OpenAI({
  baseURL: `${process.env.IMPASTO_URL ?? 'http://127.0.0.1:8000'}/v1`,
  apiKey: process.env.IMPASTO_KEY ?? 'none',
});
await mkdir(folder, { recursive: true });

// `seed` is an extension: it goes where the others are.
const answer = await client.images.generate({ model: 'dall-e-3', prompt, size: '256x256', seed: 7 });
const image = Buffer.from(answer.data[0].b64_json, 'base64');
await writeFile(join(folder, 'image.png'), image);
console.log('image.png');

const edited = await client.images.edit({
  model: 'dall-e-3',
  image: await toFile(image, 'image.png', { type: 'image/png' }),
  prompt: 'a green cone',
});
await writeFile(join(folder, 'edited.png'), Buffer.from(edited.data[0].b64_json, 'base64'));
console.log('edited.png');
