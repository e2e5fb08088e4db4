// The four tasks: tabs over one panel, whose sections say in data-modes where they belong.

import { byId } from "./dom.js";

export const MODES = ["generate", "edit", "compare", "grid"];

/** Call `changed(mode)` now and whenever another tab is chosen; returns the function that chooses one. */
export function startTabs(changed) {
  const tabs = MODES.map((mode) => byId(`tab-${mode}`));

  function choose(mode, focus = false) {
    MODES.forEach((name, i) => {
      tabs[i].setAttribute("aria-selected", String(name === mode));
      tabs[i].tabIndex = name === mode ? 0 : -1;
      if (name === mode && focus) tabs[i].focus();
    });
    byId("workspace").dataset.mode = mode;
    byId("workspace").setAttribute("aria-labelledby", `tab-${mode}`);
    for (const section of document.querySelectorAll("[data-modes]")) {
      section.hidden = !section.dataset.modes.split(" ").includes(mode);
    }
    history.replaceState(null, "", mode === "generate" ? location.pathname : `#${mode}`);
    changed(mode);
  }

  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => choose(MODES[i]));
    tab.addEventListener("keydown", (event) => {
      const last = MODES.length - 1;
      const next = { ArrowRight: i === last ? 0 : i + 1, ArrowLeft: i === 0 ? last : i - 1, Home: 0, End: last }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      choose(MODES[next], true);
    });
  });
  const asked = location.hash.slice(1);
  choose(MODES.includes(asked) ? asked : "generate");
  return choose;
}
