// The adapters that the server offers, each with its weight.

import { byId, el } from "../dom.js";

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
    type: "range", min: "-1", max: "2", step: "0.05", value: "1", disabled: true, "aria-label": `Weight of ${id}`,
  });
  const show = () => {
    weight.disabled = !box.checked;
    value.textContent = box.checked ? Number(weight.value).toFixed(2) : "";
  };
  for (const input of [box, weight]) {
    input.addEventListener("input", () => {
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
    weight.value = String(found?.weight ?? 1);
    element.show();
  }
}
