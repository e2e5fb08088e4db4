// The image to edit: chosen, dropped or taken from the history; whole, or where a mask says; or as a reference.

import { announce, byId, el, notify } from "../dom.js";
import { fitted } from "../settings/sizes.js";
import { Mask } from "./mask.js";

const MOST_BYTES = 32 << 20;

export class Edit {
  /** `model()`: the one that is chosen. */
  constructor(model) {
    this.model = model;
    this.references = []; // {blob, url}
    this.mask = new Mask(byId("source-canvas"), byId("brush"), () => this.#showTools());
    this.mask.onsize = (factor) => {
      byId("brush-size").value = String(Math.round(byId("brush-size").value * factor));
      this.#brushSize();
    };
    byId("source-file").addEventListener("change", ({ target }) => {
      if (target.files[0]) this.take(target.files[0]);
      target.value = "";
    });
    byId("source-remove").addEventListener("click", () => this.#remove());
    byId("brush-size").addEventListener("input", () => this.#brushSize());
    byId("mask-erase").addEventListener("click", () => {
      this.mask.erase = !this.mask.erase;
      byId("mask-erase").setAttribute("aria-pressed", String(this.mask.erase));
    });
    byId("mask-undo").addEventListener("click", () => this.#keepFocus(byId("mask-undo"), () => this.mask.undo()));
    byId("mask-clear").addEventListener("click", () => this.#keepFocus(byId("mask-clear"), () => this.mask.clear()));
    byId("mask-invert").addEventListener("click", () => this.mask.invert());
    byId("strength").addEventListener("input", () => this.#strength());
    for (const radio of document.getElementsByName("edit-kind")) radio.addEventListener("change", () => this.#show());
    byId("reference-files").addEventListener("change", ({ target }) => {
      this.#addReferences([...target.files]);
      target.value = "";
    });
    this.#brushSize();
    this.#strength();
    this.#show();
  }

  get takesReferences() {
    return (this.model()?.most_images ?? 1) > 1;
  }

  get masked() {
    return document.querySelector("[name=edit-kind]:checked").value === "mask" && this.model()?.masks;
  }

  /** Edit an image file from now on. */
  async take(blob) {
    let bitmap;
    try {
      if (blob.size > MOST_BYTES) throw new RangeError("too large");
      bitmap = await createImageBitmap(blob);
    } catch {
      notify("This file cannot be read as an image of at most 32 MB.");
      return;
    }
    this.bitmap?.close();
    this.bitmap = bitmap;
    this.fit();
    this.#show();
    announce(`Image to edit, ${bitmap.width} by ${bitmap.height} pixels`);
  }

  /** The model has changed, and with it the size to generate. */
  fit() {
    if (this.bitmap && this.model()) {
      const { width, height } = fitted(this.bitmap.width, this.bitmap.height, this.model());
      if (width !== this.mask.canvas.width || height !== this.mask.canvas.height || this.mask.image !== this.bitmap) {
        this.mask.setImage(this.bitmap, width, height);
      }
    }
    this.#show();
  }

  /** What a request needs, or null if something is missing, which the person then hears. */
  async given() {
    if (!this.model().edits) {
      notify(`The model ${this.model().id} does not edit images. Choose another one.`);
      return null;
    }
    if (!this.bitmap) {
      notify("Choose an image to edit.");
      byId("source-file").focus();
      return null;
    }
    if (this.masked && this.mask.share() === 0) {
      notify("Paint over what should change, or choose Whole image.");
      byId("source-canvas").focus();
      return null;
    }
    const { width, height } = this.mask.canvas;
    return {
      image: await this.#image(width, height),
      mask: this.masked ? await this.mask.blob() : null,
      references: this.takesReferences ? this.references.map(({ blob }) => blob) : [],
      strength: this.takesReferences ? null : Number(byId("strength").value),
      width,
      height,
      words: this.takesReferences ? "with references" : `${this.masked ? "masked area" : "whole image"}, strength ${byId("strength").value}`,
    };
  }

  #image(width, height) {
    const canvas = el("canvas", { width, height });
    const context = canvas.getContext("2d");
    context.fillStyle = "#fff";
    context.fillRect(0, 0, width, height);
    context.drawImage(this.bitmap, 0, 0, width, height);
    return new Promise((resolve) => { canvas.toBlob(resolve, "image/png"); });
  }

  #remove() {
    this.bitmap?.close();
    this.bitmap = null;
    this.mask.image = null;
    this.#show();
    byId("source-file").focus();
  }

  #show() {
    const loaded = Boolean(this.bitmap);
    byId("source-drop").hidden = loaded;
    byId("source-loaded").hidden = !loaded;
    byId("source-kind").hidden = !this.model()?.masks;
    byId("mask-tools").hidden = !this.masked;
    byId("references").hidden = !this.takesReferences;
    byId("strength-field").hidden = this.takesReferences;
    if (this.mask.enabled !== Boolean(this.masked)) this.mask.enable(Boolean(this.masked));
  }

  #showTools() {
    const none = this.mask.operations.length === 0;
    byId("mask-undo").disabled = none;
    byId("mask-clear").disabled = none || this.mask.share() === 0;
  }

  /** A button that disables itself would lose the focus to the page. */
  #keepFocus(button, action) {
    action();
    if (button.disabled) byId("source-canvas").focus();
  }

  #brushSize() {
    byId("brush-size-value").textContent = `${byId("brush-size").value} %`;
    this.mask.setSize(byId("brush-size").value / 100);
  }

  #strength() {
    byId("strength-value").textContent = Number(byId("strength").value).toFixed(2);
  }

  async #addReferences(files) {
    for (const file of files) {
      if (this.references.length + 1 >= this.model().most_images) {
        notify(`This model takes at most ${this.model().most_images} images.`);
        break;
      }
      const bitmap = await createImageBitmap(file).catch(() => null);
      if (!bitmap || file.size > MOST_BYTES) {
        notify(`${file.name} cannot be read as an image of at most 32 MB.`);
        continue;
      }
      bitmap.close();
      this.references.push({ blob: file, url: URL.createObjectURL(file), name: file.name });
    }
    this.#showReferences();
  }

  #showReferences() {
    byId("reference-list").replaceChildren(...this.references.map((reference, i) => {
      const remove = el("button", { type: "button", "aria-label": `Remove reference ${i + 1}` }, "×");
      remove.addEventListener("click", () => {
        URL.revokeObjectURL(reference.url);
        this.references.splice(i, 1);
        this.#showReferences();
        byId("reference-files").focus();
      });
      return el("li", {}, el("img", { src: reference.url, alt: `Reference ${i + 1}: ${reference.name}` }), remove);
    }));
  }
}
