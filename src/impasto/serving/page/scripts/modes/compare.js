// Two settings: the form shows those of one image at a time.

import { announce, byId } from "../dom.js";
import { differences, inWords } from "../settings/facts.js";

export class Compare {
  constructor(form) {
    this.form = form;
    this.sides = null;
    this.side = "A";
    for (const radio of document.getElementsByName("side")) radio.addEventListener("change", () => this.#turn(radio.value));
    byId("copy-side").addEventListener("click", () => {
      if (!this.sides) return;
      this.update();
      this.sides[this.#other] = structuredClone(this.sides[this.side]);
      this.#show();
      announce(`Image ${this.#other} has the settings of image ${this.side}`);
    });
  }

  get #other() {
    return this.side === "A" ? "B" : "A";
  }

  /** The tab is chosen: the side that the form shows has what the form says. */
  enter() {
    const settings = this.form.read();
    this.sides ??= { A: settings, B: structuredClone(settings) };
    this.update();
  }

  /** The form has changed. */
  update() {
    if (!this.sides) return;
    this.sides[this.side] = this.form.read();
    this.#show();
  }

  /** Both images: their settings, and in the title where they differ. */
  shots(seedOf) {
    this.update();
    const { A, B } = this.sides;
    const shared = seedOf("");
    return [["A", A], ["B", B]].map(([title, settings]) => ({
      title: [`Image ${title}`, ...inWords(settings, differences(A, B))].join(" · "),
      settings: { ...settings, seed: settings.seed || shared },
    }));
  }

  /** Whether the form accepts both sides; it shows the one that it does not. */
  check() {
    if (!this.form.check()) return false;
    this.#choose(this.#other);
    if (!this.form.check()) return false;
    this.#choose(this.#other);
    return true;
  }

  #choose(side) {
    document.querySelector(`[name=side][value=${side}]`).checked = true;
    this.#turn(side);
  }

  #turn(side) {
    if (!this.sides) { // no model yet
      this.side = side;
      return;
    }
    this.sides[this.side] = this.form.read();
    this.side = side;
    this.form.write(this.sides[side]);
    this.#show();
  }

  #show() {
    const found = differences(this.sides.A, this.sides.B);
    byId("side-differences").textContent = found.length ? `Different: ${found.join(", ")}` : "Both are the same. Change one of them.";
    byId("copy-side").textContent = `Copy ${this.side} to ${this.#other}`;
  }
}
