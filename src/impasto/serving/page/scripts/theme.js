// Light or dark: as the system is, until the person chooses.

import { byId } from "./dom.js";
import { lasting } from "./storage.js";

const system = matchMedia("(prefers-color-scheme: dark)");
const ORDER = ["system", "light", "dark"];

const chosen = () => ORDER.find((choice) => choice === lasting.get("theme")) ?? "system";

function show() {
  const choice = chosen();
  const dark = choice === "dark" || (choice === "system" && system.matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  const label = `Theme: ${choice}`;
  byId("theme").setAttribute("aria-label", label);
  byId("theme").title = label;
}

export function startTheme() {
  show();
  system.addEventListener("change", show);
  byId("theme").addEventListener("click", () => {
    lasting.set("theme", ORDER[(ORDER.indexOf(chosen()) + 1) % ORDER.length]);
    show();
  });
}
