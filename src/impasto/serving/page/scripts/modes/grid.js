// One setting, several values.

import { byId, complain } from "../dom.js";
import { MOST_SEED } from "../settings/form.js";

const MOST = 36;
const AXES = {
  seed: { start: "1-6", help: "Whole numbers or ranges, such as 1-6 or 7, 42.", least: 0, most: MOST_SEED, whole: true, label: "Seed" },
  guidance: { start: "1, 2, 3, 4.5, 6, 8", help: "Numbers, such as 1, 2, 4.5.", least: 0, most: 100, whole: false, label: "Guidance" },
  steps: { start: "5, 10, 20, 40", help: "Whole numbers or ranges, such as 5, 10, 20.", least: 1, whole: true, label: "Steps" },
};

/** The values of a text, or what is wrong with it. The server says how many steps an image may have. */
export function valuesOf(text, axis, mostSteps) {
  const { least, most = mostSteps, whole, label } = AXES[axis];
  const values = [];
  for (const part of text.split(/[,;\s]+/).filter(Boolean)) {
    const range = whole && /^(\d{1,16})[-–](\d{1,16})$/.exec(part);
    const [from, to] = range ? [Number(range[1]), Number(range[2])] : [Number(part), Number(part)];
    const fine = (value) => value >= least && value <= most && (!whole || Number.isInteger(value));
    if (!fine(from) || !fine(to) || to < from) return { problem: `${label}: “${part}” is not ${whole ? "a whole number" : "a number"} from ${least} to ${most}.` };
    if (to - from >= MOST) return { problem: `At most ${MOST} images.` };
    for (let value = from; value <= to; value++) values.push(value);
  }
  if (!values.length) return { problem: "Give at least one value." };
  if (values.length > MOST) return { problem: `At most ${MOST} images.` };
  return { values };
}

export class Grid {
  constructor() {
    byId("grid-axis").addEventListener("change", () => this.#takeAxis());
    this.#takeAxis();
  }

  #takeAxis() {
    const { start, help } = AXES[byId("grid-axis").value];
    byId("grid-values").value = start;
    byId("grid-help").textContent = help;
    complain(byId("grid-values"), null);
  }

  /** A shot for each value, or null if the values are wrong, which the person then sees. */
  shots(settings, seedOf, model) {
    const axis = byId("grid-axis").value;
    const { values, problem } = valuesOf(byId("grid-values").value, axis, model.most_steps);
    complain(byId("grid-values"), problem);
    if (problem) {
      byId("grid-values").focus();
      return null;
    }
    const seed = seedOf(settings.seed);
    return values.map((value) => ({
      title: `${AXES[axis].label} ${value}`,
      settings: { ...settings, seed, [axis]: axis === "seed" ? String(value) : value },
    }));
  }
}
