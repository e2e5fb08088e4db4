// An image on the stage: while it waits, while it is generated, and when it is done.

import { generate } from "../api/client.js";
import { byId, el, seconds } from "../dom.js";

const AT_ONCE = 4;
let running = 0;
const waiting = [];

/** Wait for one of a few places: a grid should not fill the server's queue. */
async function place(signal) {
  if (running >= AT_ONCE) {
    await new Promise((resolve, reject) => {
      waiting.push(resolve);
      signal.addEventListener("abort", () => {
        const i = waiting.indexOf(resolve);
        if (i >= 0) waiting.splice(i, 1);
        reject(signal.reason);
      });
    });
  } else running++;
}

function leave() {
  const next = waiting.shift();
  if (next) next();
  else running--;
}

export class Card {
  /**
   * `shot`: {settings, title, given}. `actions`: done(blob, settings, seconds) returns the entry of the history;
   * open(entry), reuse(seed), use(settings), edit(blob).
   */
  constructor(shot, actions) {
    Object.assign(this, { shot, actions });
    this.frame = el("div", { class: "frame" });
    this.frame.style.aspectRatio = `${shot.settings.width} / ${shot.settings.height}`;
    this.title = el("p", { class: "title" }, shot.title);
    this.title.hidden = !shot.title;
    this.bar = el("progress", { max: 1, value: 0, "aria-label": `Progress of ${shot.title || "the image"}` });
    this.status = el("p", { class: "status" });
    this.tools = el("div", { class: "tools" });
    this.element = el("li", { class: "card" }, this.frame, this.title, this.bar, this.status, this.tools);
  }

  /** Generate the image; resolves to "done", "failed" or "cancelled". */
  async run() {
    const { settings, given } = this.shot;
    this.stop = new AbortController();
    this.element.className = "card running";
    this.bar.hidden = false;
    this.bar.value = 0;
    this.status.className = "status";
    this.status.textContent = "Waiting";
    this.tools.replaceChildren(this.#button("Cancel", () => this.stop.abort()));
    let taken = false;
    try {
      await place(this.stop.signal);
      taken = true;
      const start = performance.now();
      const { blob, seed } = await generate(settings, given, this.stop.signal, this);
      await this.#done(blob, { ...settings, seed: String(seed) }, (performance.now() - start) / 1000);
      return "done";
    } catch (error) {
      const cancelled = error.name === "AbortError";
      this.#ended(cancelled ? "Cancelled" : error.message, !cancelled);
      return cancelled ? "cancelled" : "failed";
    } finally {
      if (taken) leave();
    }
  }

  cancel() {
    this.stop?.abort();
  }

  // --- what generate() reports ---

  progress({ step, steps, secondsLeft }) {
    this.bar.max = steps;
    this.bar.value = step;
    const left = secondsLeft === null || secondsLeft === undefined ? "" : ` · ${seconds(secondsLeft)} left`;
    this.status.textContent = step >= steps ? "Finishing" : `Step ${step} of ${steps}${left}`;
  }

  preview(blob) {
    this.#image(blob, "Preview", "preview");
  }

  waiting(time) {
    this.status.textContent = `The server is busy. Trying again in ${time} s`;
  }

  // --- how it ends ---

  async #done(blob, settings, time) {
    const entry = await this.actions.done(blob, settings, time);
    const button = el("button", { type: "button", class: "frame" });
    button.style.aspectRatio = this.frame.style.aspectRatio;
    button.addEventListener("click", () => this.actions.open(entry));
    const focused = this.element.contains(document.activeElement);
    this.frame.replaceWith(button);
    this.frame = button;
    this.#image(blob, settings.prompt, "");
    this.element.className = "card";
    this.bar.hidden = true;
    this.status.textContent = `Seed ${settings.seed} · ${settings.width} × ${settings.height} · ${seconds(time)}`;
    const download = el("a", { class: "button", href: this.url, download: fileName(settings) }, "Download");
    this.tools.replaceChildren(
      this.#button("Reuse seed", () => this.actions.reuse(settings.seed)),
      this.#button("Edit", () => this.actions.edit(blob, settings)),
      download,
    );
    if (focused) button.focus();
  }

  #ended(message, failed) {
    this.#image(null);
    this.element.className = "card failed";
    this.bar.hidden = true;
    this.status.className = failed ? "status failed" : "status";
    this.status.textContent = message;
    const focused = this.element.contains(document.activeElement);
    const again = this.#button("Try again", () => this.actions.again(this));
    this.tools.replaceChildren(again);
    if (focused) again.focus();
  }

  #image(blob, alt, className) {
    if (this.url) URL.revokeObjectURL(this.url);
    this.url = blob ? URL.createObjectURL(blob) : null;
    if (!blob) return this.frame.replaceChildren();
    let image = this.frame.querySelector("img");
    if (!image) {
      image = el("img");
      this.frame.append(image);
    }
    Object.assign(image, { src: this.url, alt, className });
    return image;
  }

  #button(label, action) {
    const button = el("button", { type: "button" }, label);
    if (this.shot.title) button.setAttribute("aria-label", `${label}: ${this.shot.title}`);
    button.addEventListener("click", action);
    return button;
  }

  /** The card leaves the page. */
  forget() {
    this.cancel();
    if (this.url) URL.revokeObjectURL(this.url);
  }
}

export const fileName = (settings) => `impasto-${settings.seed}.${settings.format === "jpeg" ? "jpg" : settings.format ?? "png"}`;

/** The cards on the stage. */
export class Stage {
  constructor(actions) {
    this.actions = actions;
    this.cards = {}; // by mode
  }

  /** New cards for a mode, one for each shot, which are not running yet. */
  place(shots, mode) {
    for (const card of this.cards[mode] ?? []) card.forget();
    this.cards[mode] = shots.map((shot) => new Card(shot, this.actions));
    this.show(mode);
    return this.cards[mode];
  }

  /** Show the cards of a mode. */
  show(mode) {
    const cards = this.cards[mode] ?? [];
    const list = byId("results");
    list.dataset.mode = mode;
    list.dataset.columns = String(mode === "grid" ? 0 : cards.length);
    list.replaceChildren(...cards.map((card) => card.element));
    byId("empty").hidden = cards.length > 0;
  }

  cancel() {
    for (const card of Object.values(this.cards).flat()) card.cancel();
  }
}
