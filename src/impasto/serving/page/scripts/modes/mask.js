// A mask painted over an image. It is a list of operations: undo removes the last one and paints the rest again.

const COLOUR = "#ff3d7f";
const SHOWN = 0.55;
const MOST_UNDO = 200;

export class Mask {
  /** `canvas` shows the image and the mask over it; `brush` follows the pointer; `changed()` is called after changes. */
  constructor(canvas, brush, changed) {
    Object.assign(this, { canvas, brush, changed, enabled: false, erase: false, size: 0.2, operations: [] });
    this.layer = document.createElement("canvas");
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => this.#up());
    canvas.addEventListener("pointerleave", () => this.#showBrush(document.activeElement === canvas));
    canvas.addEventListener("keydown", (event) => this.#keyDown(event));
    canvas.addEventListener("keyup", (event) => {
      if (event.key === " ") this.#up();
    });
    canvas.addEventListener("focus", () => this.#showBrush(canvas.matches(":focus-visible")));
    canvas.addEventListener("blur", () => {
      this.#up();
      this.#showBrush(false);
    });
  }

  setImage(image, width, height) {
    Object.assign(this.canvas, { width, height });
    Object.assign(this.layer, { width, height });
    this.image = image;
    this.at = [width / 2, height / 2];
    this.operations = [];
    this.stroke = null;
    this.#repaint();
  }

  enable(enabled) {
    this.enabled = enabled;
    this.canvas.classList.toggle("paintable", enabled);
    if (enabled) {
      this.canvas.tabIndex = 0;
      this.canvas.setAttribute("role", "application");
      this.canvas.setAttribute("aria-label", "Mask. Arrow keys move the brush, space paints, brackets change its size.");
      this.canvas.setAttribute("aria-describedby", "mask-help");
    } else {
      this.canvas.removeAttribute("tabindex");
      this.canvas.removeAttribute("aria-describedby");
      this.canvas.setAttribute("role", "img");
      this.canvas.setAttribute("aria-label", "Image to edit");
    }
    this.#showBrush(false);
    this.#show();
  }

  setSize(size) {
    this.size = size;
    this.#showBrush(!this.brush.hidden);
  }

  undo() {
    this.operations.pop();
    this.#repaint();
  }

  clear() { this.#add({ kind: "clear" }); }
  invert() { this.#add({ kind: "invert" }); }

  /** How much of the image is masked, from 0 to 1. */
  share() {
    const { data } = this.layer.getContext("2d").getImageData(0, 0, this.layer.width, this.layer.height);
    let masked = 0;
    for (let i = 3; i < data.length; i += 4) if (data[i] > 127) masked++;
    return masked / (data.length / 4);
  }

  /** The mask as the API takes it: a PNG that is transparent where the image is repainted. */
  blob() {
    const canvas = document.createElement("canvas");
    Object.assign(canvas, { width: this.layer.width, height: this.layer.height });
    const context = canvas.getContext("2d");
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.globalCompositeOperation = "destination-out";
    context.drawImage(this.layer, 0, 0);
    return new Promise((resolve) => { canvas.toBlob(resolve, "image/png"); });
  }

  // --- painting ---

  #down(event) {
    if (!this.enabled || event.button !== 0) return;
    event.preventDefault();
    this.canvas.focus({ preventScroll: true });
    this.canvas.setPointerCapture(event.pointerId);
    this.#begin(this.#point(event));
  }

  #move(event) {
    if (!this.enabled) return;
    this.at = this.#point(event);
    this.#showBrush(true);
    if (this.stroke) this.#extend(this.at);
  }

  #up() {
    if (!this.stroke) return;
    this.stroke = null;
    this.changed();
  }

  #keyDown(event) {
    if (!this.enabled) return;
    const step = Math.max(this.canvas.width, this.canvas.height) * (event.shiftKey ? 0.005 : 0.03);
    const [x, y] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [0, 0];
    if (x || y) {
      this.at = [clamp(this.at[0] + x * step, this.canvas.width), clamp(this.at[1] + y * step, this.canvas.height)];
      if (this.stroke) this.#extend(this.at);
    } else if (event.key === " ") {
      if (!this.stroke) this.#begin(this.at);
    } else if (event.key.toLowerCase() === "z" && (event.ctrlKey || event.metaKey)) {
      if (this.operations.length) this.undo();
    } else if (event.key === "[" || event.key === "]") {
      this.onsize?.(event.key === "]" ? 1.2 : 1 / 1.2);
    } else return;
    event.preventDefault();
    this.#showBrush(true);
  }

  #begin(point) {
    this.at = point;
    this.stroke = { kind: "stroke", erase: this.erase, radius: this.#radius(), points: [point] };
    this.#add(this.stroke, false);
  }

  #extend(point) {
    const from = this.stroke.points.at(-1);
    this.stroke.points.push(point);
    paint(this.layer.getContext("2d"), { ...this.stroke, points: [from, point] });
    this.#show();
  }

  #add(operation, tell = true) {
    this.operations.push(operation);
    if (this.operations.length > MOST_UNDO) this.#flatten();
    this.#apply(operation);
    this.#show();
    if (tell) this.changed();
  }

  /** The oldest half becomes what undo ends at. */
  #flatten() {
    const old = this.operations.splice(0, MOST_UNDO / 2);
    const layer = this.layer;
    const base = document.createElement("canvas");
    Object.assign(base, { width: layer.width, height: layer.height });
    this.layer = base;
    for (const operation of old) this.#apply(operation);
    this.layer = layer;
    this.operations.unshift({ kind: "base", base });
  }

  #apply(operation) {
    const context = this.layer.getContext("2d");
    const { width, height } = this.layer;
    if (operation.kind === "stroke") paint(context, operation);
    else if (operation.kind === "clear") context.clearRect(0, 0, width, height);
    else if (operation.kind === "base") context.drawImage(operation.base, 0, 0);
    else {
      context.globalCompositeOperation = "source-out";
      context.fillStyle = COLOUR;
      context.fillRect(0, 0, width, height);
      context.globalCompositeOperation = "source-over";
    }
  }

  #repaint() {
    this.layer.getContext("2d").clearRect(0, 0, this.layer.width, this.layer.height);
    for (const operation of this.operations) this.#apply(operation);
    this.#show();
    this.changed();
  }

  #show() {
    if (!this.image) return;
    const context = this.canvas.getContext("2d");
    context.globalAlpha = 1;
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    context.drawImage(this.image, 0, 0, this.canvas.width, this.canvas.height);
    if (!this.enabled) return;
    context.globalAlpha = SHOWN;
    context.drawImage(this.layer, 0, 0);
  }

  #radius() {
    return (this.size * Math.min(this.canvas.width, this.canvas.height)) / 2;
  }

  #point(event) {
    const box = this.canvas.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * this.canvas.width, ((event.clientY - box.top) / box.height) * this.canvas.height];
  }

  #showBrush(visible) {
    this.brush.hidden = !(visible && this.enabled && this.image);
    if (this.brush.hidden) return;
    const scale = this.canvas.clientWidth / this.canvas.width;
    const { style } = this.brush;
    [style.left, style.top] = [`${this.at[0] * scale}px`, `${this.at[1] * scale}px`];
    style.width = style.height = `${2 * this.#radius() * scale}px`;
  }
}

function paint(context, { points, radius, erase }) {
  context.globalCompositeOperation = erase ? "destination-out" : "source-over";
  context.strokeStyle = context.fillStyle = COLOUR;
  context.lineCap = context.lineJoin = "round";
  context.lineWidth = 2 * radius;
  context.beginPath();
  context.moveTo(...points[0]);
  for (const point of points) context.lineTo(...point);
  if (points.length > 1) context.stroke();
  else {
    context.arc(...points[0], radius, 0, 2 * Math.PI);
    context.fill();
  }
  context.globalCompositeOperation = "source-over";
}

const clamp = (value, most) => Math.min(Math.max(value, 0), most);
