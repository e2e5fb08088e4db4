// The adapters that the server offers, each with its weight.

import { byId, el } from "../dom.js";

const [LEAST, MOST] = [-10, 10]; // what the API takes
const [LOW, HIGH] = [-1, 2]; // what the slider shows, as long as no weight is outside
const STEP = 0.05;

/** Show adapters; `changed(adapter)` is called when the person switches one on, `changed()` after other changes. */
export function listAdapters(adapters, changed) {
  byId("adapters").hidden = adapters.length === 0;
  byId("adapter-list").replaceChildren(...adapters.map((adapter) => row(adapter, changed)));
}

function row(adapter, changed) {
  const { id } = adapter;
  const box = el("input", { type: "checkbox", value: id });
  const value = el("output", {}, "1.00");
  const weight = el("input", {
    type: "range", min: LOW, max: HIGH, step: STEP, value: "1", disabled: true, "aria-label": `Weight of ${id}`,
  });
  const show = () => {
    weight.disabled = !box.checked;
    value.textContent = box.checked ? Number(weight.value).toFixed(2) : "";
  };
  for (const input of [box, weight]) {
    input.addEventListener("input", () => {
      if (input === weight) weight.step = STEP; // the person has left a weight between the steps
      show();
      changed(input === box && box.checked ? adapter : undefined);
    });
  }
  show();
  const element = el("div", { class: "adapter" }, el("label", {}, box, el("span", {}, id)), weight, value);
  element.show = show;
  return element;
}

export function chosenAdapters() {
  return [...byId("adapter-list").children]
    .map((element) => [element.querySelector("[type=checkbox]"), element.querySelector("[type=range]")])
    .filter(([box]) => box.checked)
    .map(([box, weight]) => ({ name: box.value, weight: Number(weight.value) }));
}

export function chooseAdapters(chosen) {
  for (const element of byId("adapter-list").children) {
    const [box, weight] = [element.querySelector("[type=checkbox]"), element.querySelector("[type=range]")];
    const found = chosen.find(({ name }) => name === box.value);
    box.checked = found !== undefined;
    setWeight(weight, Number(found?.weight ?? 1));
    element.show();
  }
}

/** A slider moves a value that is outside of its range, or between its steps, without a word. */
function setWeight(slider, weight) {
  slider.min = Math.max(LEAST, Math.floor(Math.min(LOW, weight)));
  slider.max = Math.min(MOST, Math.ceil(Math.max(HIGH, weight)));
  slider.step = Math.abs(weight / STEP - Math.round(weight / STEP)) > 1e-6 ? "any" : STEP;
  slider.value = weight;
}
