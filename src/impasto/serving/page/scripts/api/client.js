// The server's own API, as any other client would use it.

import { authorization, askForKey, showForget } from "./key.js";
import { ApiError, errorOf } from "./errors.js";
import { events } from "./sse.js";

const PREVIEWS = 3; // the most that the API streams
const TRIES = 20;

/** What the server serves: {models, adapters}. */
export async function catalogue() {
  const answer = await (await send("v1/models", {})).json();
  return { models: answer.data, adapters: answer.adapters ?? [] };
}

/**
 * Generate one image. `settings` have a seed; `given`: {image, mask, references, strength} for edits.
 * `watch` has progress({step, steps, secondsLeft}), preview(blob) and waiting(seconds).
 * Resolves to {blob, seed}; rejects with an ApiError, or an AbortError once `signal` is aborted.
 */
export async function generate(settings, given, signal, watch) {
  const path = given ? "v1/images/edits" : "v1/images/generations";
  const response = await patiently(path, () => bodyOf(settings, given), signal, watch);
  try {
    for await (const event of events(response)) {
      const kind = event.type ?? "";
      if (event.error) throw new ApiError(event.error.message ?? "The server could not generate the image.");
      if (kind === "progress") watch.progress({ step: event.step, steps: event.steps, secondsLeft: event.seconds_left });
      else if (kind.endsWith(".partial_image")) watch.preview(imageOf(event));
      else if (kind.endsWith(".completed")) return { blob: imageOf(event), seed: event.seed ?? settings.seed };
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    // A connection that was cut: the browser's own words for it ("network error") say less than those below.
  }
  throw new ApiError("The connection ended before the image was done.");
}

function bodyOf(settings, given) {
  const fields = {
    model: settings.model,
    prompt: settings.prompt,
    negative_prompt: settings.negative,
    size: `${settings.width}x${settings.height}`,
    num_inference_steps: settings.steps,
    guidance_scale: settings.guidance,
    seed: Number(settings.seed),
    output_format: settings.format,
    stream: true,
    partial_images: PREVIEWS,
  };
  if (settings.scheduler) fields.scheduler = settings.scheduler;
  const adapters = settings.adapters.map(({ name, weight }) => ({ name, weight }));
  if (!given) {
    if (adapters.length) fields.lora = adapters;
    return { body: JSON.stringify(fields), headers: { "Content-Type": "application/json" } };
  }
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) form.append(name, String(value));
  if (adapters.length) form.append("lora", JSON.stringify(adapters));
  const several = given.references.length > 0;
  for (const image of [given.image, ...given.references]) form.append(several ? "image[]" : "image", image, "image.png");
  if (given.mask) form.append("mask", given.mask, "mask.png");
  if (given.strength !== null) form.append("strength", String(given.strength));
  return { body: form, headers: {} };
}

/** Send, and send again after the time that a busy server names. */
async function patiently(path, make, signal, watch) {
  for (let tries = 1; ; tries++) {
    try {
      return await send(path, { method: "POST", ...make() }, signal);
    } catch (error) {
      if (error.retryAfter === null || error.retryAfter === undefined || tries === TRIES) throw error;
      watch.waiting(error.retryAfter);
      await pause(error.retryAfter * 1000, signal);
    }
  }
}

async function send(path, options, signal) {
  for (let asked = false; ; asked = true) {
    let response;
    try {
      response = await fetch(path, { ...options, headers: { ...options.headers, ...authorization() }, signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The server does not answer. Is it still running?");
    }
    showForget();
    if (response.ok) return response;
    if (response.status !== 401) throw await errorOf(response);
    await keyOnce(asked || "Authorization" in authorization());
  }
}

let asking = null;

/** Several requests may lack the key at once; the person is asked once. */
function keyOnce(wrong) {
  asking ??= askForKey(wrong).finally(() => { asking = null; });
  return asking;
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}

function imageOf(event) {
  const bytes = Uint8Array.from(atob(event.b64_json), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: `image/${event.output_format ?? "png"}` });
}
