// The form: what the person chooses, and what is wrong with it.

import { byId, complain, el } from "../dom.js";
import { lasting } from "../storage.js";
import { chooseAdapters, chosenAdapters, listAdapters } from "./adapters.js";
import { ASPECTS, sizeOf, sizeProblem } from "./sizes.js";

const STORED = "impasto-settings";
export const MOST_SEED = Number.MAX_SAFE_INTEGER; // as in the API
const TEXTS = ["prompt", "negative", "seed"]; // what means the same to every model
const SCHEDULERS = { "dpm++": "DPM++", ddim: "DDIM", ddpm: "DDPM", lcm: "LCM" };

export const randomSeed = () => String(crypto.getRandomValues(new Uint32Array(1))[0]);

/** The seed of image `i` of several; 0 follows the last one. */
export const seedAfter = (first, i) => (i <= MOST_SEED - first ? first + i : i - (MOST_SEED - first) - 1);

export class SettingsForm {
  /** `changed()` is called after every change that the person makes. */
  constructor(changed) {
    this.models = [];
    this.lastSeed = null;
    this.changed = () => {
      this.#remember();
      changed();
    };
    byId("settings").addEventListener("input", () => this.changed());
    byId("model").addEventListener("change", () => this.#takeModel());
    for (const name of ["width", "height"]) byId(name).addEventListener("input", () => this.#showAspect());
    for (const name of ["steps", "guidance"]) this.#pair(byId(name), byId(`${name}-range`));
    byId("swap").addEventListener("click", () => {
      [byId("width").value, byId("height").value] = [byId("height").value, byId("width").value];
      this.#showAspect();
      this.changed();
    });
    byId("seed-random").addEventListener("click", () => this.#setSeed(""));
    byId("seed-reuse").addEventListener("click", () => this.#setSeed(this.lastSeed));
    byId("reset").addEventListener("click", () => {
      if (!this.models.length) return;
      this.write({ ...this.#defaults(this.models[0]), prompt: "", negative: "", seed: "", adapters: [], count: 1, format: "png" });
      this.changed();
    });
  }

  get model() {
    return this.models.find(({ id }) => id === byId("model").value) ?? this.models[0];
  }

  /** Take what the server serves, and what the person chose last time. */
  start(models, adapters) {
    this.models = models;
    const stored = lasting.get(STORED);
    // What was typed before the server answered is newer than what is stored.
    const typed = TEXTS.filter((name) => byId(name).value !== "").map((name) => [name, byId(name).value]);
    byId("model").replaceChildren(...models.map(({ id, family }) => new Option(family ? `${id} (${family})` : id, id)));
    listAdapters(adapters, (adapter) => {
      if (adapter) this.#takeAdapter(adapter);
      this.changed();
    });
    this.#takeModel();
    try {
      this.write({ ...JSON.parse(stored), ...Object.fromEntries(typed) });
    } catch {
      lasting.remove(STORED);
    }
  }

  /** The settings, with an empty seed if it is to be random. */
  read() {
    return {
      prompt: byId("prompt").value.trim(),
      negative: byId("negative").value.trim(),
      model: byId("model").value,
      width: Number(byId("width").value),
      height: Number(byId("height").value),
      steps: Number(byId("steps").value),
      guidance: Number(byId("guidance").value),
      scheduler: byId("scheduler").value,
      seed: byId("seed").value.trim(),
      adapters: chosenAdapters(),
      count: Number(byId("count").value),
      format: byId("format").value,
    };
  }

  /**
   * Show settings; those that are missing, or that this server does not know, stay as they are. Returns whether they fit:
   * if they are of a model that is not served, the values that were right for it may be none that another one accepts.
   */
  write(settings) {
    const fit = !known(settings.model) || this.models.some(({ id }) => id === settings.model);
    if (fit && known(settings.model) && settings.model !== byId("model").value) {
      byId("model").value = settings.model;
      this.#takeModel();
    }
    const fields = fit ? [...TEXTS, "width", "height", "steps", "guidance"] : TEXTS;
    for (const name of fields) if (known(settings[name])) byId(name).value = settings[name];
    for (const name of fit ? ["scheduler", "count", "format"] : ["count", "format"]) {
      const options = [...byId(name).options].map((option) => option.value);
      if (options.includes(String(settings[name]))) byId(name).value = settings[name];
    }
    if (fit && Array.isArray(settings.adapters)) chooseAdapters(settings.adapters);
    for (const name of ["steps", "guidance"]) byId(`${name}-range`).value = byId(name).value;
    this.#showAspect();
    this.#remember();
    return fit;
  }

  /** Whether all is well; if not, problems are shown and the first one has the focus. `size`: whether size counts. */
  check(size = true) {
    const settings = this.read();
    const problems = [
      ["prompt", settings.prompt ? null : "Describe the image."],
      ["width", size ? sizeProblem(settings.width, settings.height, this.model) : null],
      ["steps", whole(byId("steps").value, 1, this.model.most_steps) ? null : `Give a whole number from 1 to ${this.model.most_steps}.`],
      ["guidance", real(byId("guidance").value, 0, 100) ? null : "Give a number from 0 to 100."],
      ["seed", settings.seed === "" || whole(settings.seed, 0, MOST_SEED) ? null : `Give a whole number from 0 to ${MOST_SEED}, or nothing.`],
    ];
    for (const [name, problem] of problems) complain(byId(name), problem);
    const first = problems.find(([, problem]) => problem);
    if (!first) return true;
    if (byId("more").contains(byId(first[0]))) byId("more").open = true;
    byId(first[0]).focus();
    return false;
  }

  /** What "Reuse last" gives. */
  used(seed) {
    this.lastSeed = seed;
    byId("seed-reuse").disabled = false;
  }

  #setSeed(seed) {
    byId("seed").value = seed;
    complain(byId("seed"), null);
    this.changed();
  }

  #pair(number, range) {
    range.addEventListener("input", () => { number.value = range.value; });
    number.addEventListener("input", () => { range.value = number.value; });
  }

  #defaults(model) {
    const { id, width, height, steps, guidance_scale: guidance, scheduler } = model;
    return { model: id, width, height, steps, guidance, scheduler };
  }

  /** The model has changed: its schedulers and sizes, and its own values. */
  #takeModel() {
    const model = this.model;
    byId("scheduler-field").hidden = model.schedulers.length < 2;
    byId("scheduler").replaceChildren(...model.schedulers.map((name) => new Option(SCHEDULERS[name] ?? name, name)));
    byId("aspects").replaceChildren(...ASPECTS.map((aspect) => this.#aspect(aspect)));
    for (const name of ["width", "height"]) byId(name).step = model.multiple;
    byId("steps").max = model.most_steps;
    this.write({ ...this.#defaults(model), model: undefined });
  }

  /** An adapter that was trained for other values than the model's brings them along. */
  #takeAdapter({ steps, guidance_scale: guidance, scheduler }) {
    this.write({ steps, guidance, scheduler });
  }

  #aspect(aspect) {
    const [name, across, down] = aspect;
    const radio = el("input", { type: "radio", name: "aspect", value: name });
    const shape = el("span", { class: "shape" });
    const unit = 20 / Math.max(across, down);
    shape.style.width = `${across * unit}px`;
    shape.style.height = `${down * unit}px`;
    radio.addEventListener("change", () => {
      const { width, height } = sizeOf(aspect, this.model);
      [byId("width").value, byId("height").value] = [width, height];
      complain(byId("width"), null);
      this.changed();
    });
    return el("label", {}, radio, el("span", { class: "choice" }, shape, name));
  }

  #showAspect() {
    const { width, height } = this.read();
    for (const radio of document.getElementsByName("aspect")) {
      const size = sizeOf(ASPECTS.find(([name]) => name === radio.value), this.model);
      radio.checked = size.width === width && size.height === height;
    }
  }

  #remember() {
    if (!this.models.length) return; // a form without a model has nothing worth more than what is stored
    const settings = this.read();
    lasting.set(STORED, JSON.stringify(settings));
    byId("summary").textContent = `${settings.width} × ${settings.height} · ${settings.steps} steps`;
  }
}

const known = (value) => value !== null && value !== undefined;
const whole = (text, least, most) => /^\d{1,16}$/.test(text) && Number(text) >= least && Number(text) <= most;
const real = (text, least, most) => text !== "" && Number.isFinite(Number(text)) && Number(text) >= least && Number(text) <= most;
