// The history as a gallery, and the dialog that shows one image of it.

import { announce, byId, confirmed, el, notify, seconds } from "../dom.js";
import { factsOf } from "../settings/facts.js";
import { fileName } from "./card.js";
import * as store from "./store.js";

const AT_A_TIME = 48;

export class Gallery {
  /** `actions`: use(settings), edit(blob, settings). */
  constructor(actions) {
    this.actions = actions;
    this.entries = []; // newest first
    this.urls = new Map();
    this.unsaved = 0;
    this.loading = false;
    byId("history-more").addEventListener("click", () => this.more());
    byId("history-clear").addEventListener("click", () => this.#clear());
    byId("viewer-close").addEventListener("click", () => byId("viewer").close());
    byId("viewer").addEventListener("click", (event) => {
      if (event.target === byId("viewer")) byId("viewer").close();
    });
    byId("viewer").addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") this.#step(-1);
      if (event.key === "ArrowRight") this.#step(1);
    });
    byId("viewer-newer").addEventListener("click", () => this.#step(-1));
    byId("viewer-older").addEventListener("click", () => this.#step(1));
    byId("viewer-delete").addEventListener("click", () => this.#delete());
    byId("viewer-use").addEventListener("click", () => {
      byId("viewer").close();
      this.actions.use(this.shown.settings);
    });
    byId("viewer-edit").addEventListener("click", () => {
      byId("viewer").close();
      this.actions.edit(this.shown.blob, this.shown.settings);
    });
  }

  /** Load images of earlier visits. */
  async more() {
    if (this.loading) return; // a second press would load the same ones
    this.loading = true;
    let found;
    try {
      found = await store.older(this.entries.at(-1)?.id ?? null, AT_A_TIME);
    } catch {
      return; // this browser keeps nothing, for example in a private window
    } finally {
      this.loading = false;
    }
    this.entries.push(...found);
    byId("gallery").append(...found.map((entry) => this.#item(entry)));
    this.#show(found.length === AT_A_TIME);
  }

  /** Keep a new image. Returns its entry. */
  async add(blob, settings, time) {
    let entry = { blob, settings, seconds: time, time: Date.now() };
    try {
      entry = await store.keep(entry);
    } catch {
      entry.id = -(++this.unsaved);
      if (this.unsaved === 1) notify("This browser does not keep the history. Download what you need.");
    }
    this.entries.unshift(entry);
    byId("gallery").prepend(this.#item(entry));
    this.#show(!byId("history-more").hidden);
    return entry;
  }

  open(entry) {
    this.shown = entry;
    const { settings } = entry;
    const image = byId("viewer-image");
    image.src = this.#url(entry);
    image.alt = settings.prompt;
    byId("viewer-prompt").textContent = settings.prompt;
    const facts = [...factsOf(settings), ["Time", seconds(entry.seconds)], ["Generated", new Date(entry.time).toLocaleString()]];
    byId("viewer-settings").replaceChildren(...facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
    Object.assign(byId("viewer-download"), { href: this.#url(entry), download: fileName(settings) });
    const place = this.entries.indexOf(entry);
    byId("viewer-newer").disabled = place <= 0;
    byId("viewer-older").disabled = place < 0 || place === this.entries.length - 1;
    if (!byId("viewer").open) byId("viewer").showModal();
  }

  #step(by) {
    const next = this.entries[this.entries.indexOf(this.shown) + by];
    if (!next) return;
    this.open(next);
    announce(next.settings.prompt);
  }

  async #delete() {
    if (!(await confirmed("Delete this image from the history?"))) return;
    const { shown } = this;
    try {
      if (shown.id > 0) await store.remove(shown.id);
    } catch {
      byId("viewer").close(); // it would hide the notice
      notify("This browser could not delete the image. It is still in the history.");
      return;
    }
    const place = this.entries.indexOf(shown);
    this.#forget(shown);
    let next;
    if (place >= 0) { // a card still opens an image that was deleted before
      this.entries.splice(place, 1);
      byId("gallery").children[place]?.remove();
      this.#show(!byId("history-more").hidden);
      next = this.entries[place] ?? this.entries[place - 1];
    }
    if (next) this.open(next);
    else byId("viewer").close();
    announce("Deleted");
  }

  async #clear() {
    if (!(await confirmed("Delete all images of the history?"))) return;
    try {
      await store.clear();
    } catch {
      if (this.entries.some(({ id }) => id > 0)) return notify("This browser could not delete the images. They are still in the history.");
    }
    for (const entry of this.entries) this.#forget(entry);
    this.entries = [];
    byId("gallery").replaceChildren();
    this.#show(false);
    byId("history-heading").tabIndex = -1;
    byId("history-heading").focus();
    return announce("The history is empty");
  }

  #item(entry) {
    const image = el("img", { src: this.#url(entry), alt: entry.settings.prompt, loading: "lazy" });
    const button = el("button", { type: "button" }, image);
    button.addEventListener("click", () => this.open(entry));
    return el("li", {}, button);
  }

  #url(entry) {
    if (!this.urls.has(entry.id)) this.urls.set(entry.id, URL.createObjectURL(entry.blob));
    return this.urls.get(entry.id);
  }

  #forget(entry) {
    URL.revokeObjectURL(this.urls.get(entry.id));
    this.urls.delete(entry.id);
  }

  #show(more) {
    byId("history-more").hidden = !more;
    byId("history-clear").hidden = this.entries.length === 0;
    byId("history-empty").hidden = this.entries.length > 0;
  }
}
