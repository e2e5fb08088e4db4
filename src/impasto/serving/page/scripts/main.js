// Where the page is put together.

import { catalogue } from "./api/client.js";
import { startKey } from "./api/key.js";
import { announce, byId, notify } from "./dom.js";
import { Stage } from "./images/card.js";
import { Gallery } from "./images/gallery.js";
import { Compare } from "./modes/compare.js";
import { Edit } from "./modes/edit.js";
import { Grid } from "./modes/grid.js";
import { randomSeed, seedAfter, SettingsForm } from "./settings/form.js";
import { readSettings } from "./settings/metadata.js";
import { startTabs } from "./tabs.js";
import { startTheme } from "./theme.js";

const EMPTY = {
  generate: ["Describe an image", "It appears here while it is generated."],
  edit: ["Change an image", "Choose an image, describe the result, and paint over what should change if the rest should stay."],
  compare: ["Two settings, side by side", "Change something for image A or image B, then generate both from the same noise."],
  grid: ["One setting, many values", "See how an image depends on its seed, its guidance or its steps."],
};
const LABELS = { generate: "Generate", edit: "Edit", compare: "Compare", grid: "Generate grid" };

let mode = "generate";
let choose = null;

const seedOf = (seed) => seed || randomSeed();

const form = new SettingsForm(() => {
  if (mode === "compare") compare.update();
});
const compare = new Compare(form);
const grid = new Grid();
const edit = new Edit(() => form.model);

const gallery = new Gallery({ use, edit: editImage });
const stage = new Stage({
  done(blob, settings, time) {
    form.used(settings.seed);
    return gallery.add(blob, settings, time);
  },
  open: (entry) => gallery.open(entry),
  again: (card) => run([card]),
  reuse(seed) {
    form.write({ seed });
    form.changed();
    announce(`Seed ${seed}`);
  },
  edit: editImage,
});

function use(settings) {
  const fit = form.write({ ...settings, adapters: settings.adapters ?? [] });
  form.changed();
  if (mode === "edit") choose("generate");
  byId("prompt").focus();
  if (fit) announce("Settings restored");
  else notify(withoutModel(settings));
}

const withoutModel = ({ model }) => `Prompt and seed restored. The other settings are for the model ${model}, which is not served here.`;

async function editImage(blob, settings) {
  choose("edit");
  if (settings?.prompt && !byId("prompt").value) form.write({ prompt: settings.prompt });
  await edit.take(blob);
  byId("source").scrollIntoView({ block: "nearest" });
}

// --- generating ---

async function shotsOf() {
  if (!form.models.length && !(await load())) return null;
  const settings = form.read();
  if (mode === "compare") return compare.check() ? compare.shots(seedOf) : null;
  if (!form.check(mode !== "edit" || edit.takesReferences)) return null;
  if (mode === "grid") return grid.shots(settings, seedOf, form.model);
  const given = mode === "edit" ? await edit.given() : undefined;
  if (given === null) return null;
  if (given) {
    if (!edit.takesReferences) Object.assign(settings, { width: given.width, height: given.height });
    settings.edit = given.words;
  }
  const first = Number(seedOf(settings.seed));
  return Array.from({ length: settings.count }, (_, i) => ({
    title: settings.count > 1 ? `Image ${i + 1}` : "",
    settings: { ...settings, seed: String(seedAfter(first, i)) },
    given,
  }));
}

let unfinished = 0;

async function start() {
  if (unfinished) return;
  unfinished = 1; // preparing counts: a second press must not start it twice
  showRunning();
  const shots = await shotsOf().finally(() => { unfinished--; });
  if (!shots) return showRunning();
  const cards = stage.place(shots, mode);
  const { top } = byId("results").getBoundingClientRect();
  if (top > innerHeight * 0.7) byId("results").scrollIntoView({ behavior: "smooth", block: "start" });
  return run(cards);
}

async function run(cards) {
  unfinished += cards.length;
  showRunning();
  announce(cards.length === 1 ? "Generating" : `Generating ${cards.length} images`);
  const ends = await Promise.all(cards.map((card) => card.run().finally(() => {
    unfinished--;
    showRunning();
  })));
  const count = (end) => ends.filter((found) => found === end).length;
  const words = [["done", "done"], ["failed", "failed"], ["cancelled", "cancelled"]]
    .filter(([end]) => count(end))
    .map(([end, word]) => `${count(end)} ${word}`);
  announce(ends.length === 1 ? { done: "The image is done", failed: "The image failed", cancelled: "Cancelled" }[ends[0]] : words.join(", "));
}

function showRunning() {
  byId("generate").setAttribute("aria-disabled", String(unfinished > 0));
  byId("generate").textContent = unfinished ? "Generating…" : LABELS[mode];
  const focused = document.activeElement === byId("cancel-all");
  byId("cancel-all").hidden = unfinished === 0;
  if (focused && unfinished === 0) byId("generate").focus();
}

byId("settings").addEventListener("submit", (event) => {
  event.preventDefault();
  start();
});
byId("settings").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    start();
  }
});
byId("cancel-all").addEventListener("click", () => stage.cancel());
byId("notice-close").addEventListener("click", () => { byId("notice").hidden = true; });

/** An edited image has the size of the original, unless it is a reference. */
function showSize() {
  byId("size-group").hidden = mode === "edit" && !edit.takesReferences;
}

// --- files: an image to edit on the Edit tab, elsewhere settings ---

async function restore(file) {
  const found = await readSettings(file);
  if (!found) return notify("This file holds no settings of a generated image.");
  const fit = form.write({ ...found, seed: found.seed ?? "", scheduler: found.sampler });
  form.changed();
  return notify(fit ? "Settings restored from the image." : withoutModel(found));
}

byId("restore-file").addEventListener("change", ({ target }) => {
  if (target.files[0]) restore(target.files[0]);
  target.value = "";
});

const holdsFiles = (event) => [...event.dataTransfer.types].includes("Files");
addEventListener("dragover", (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  if (mode === "edit") byId("source-drop").classList.add("over");
  else byId("drop-veil").hidden = false;
});
const dropEnds = () => {
  byId("source-drop").classList.remove("over");
  byId("drop-veil").hidden = true;
};
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) dropEnds();
});
addEventListener("drop", (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  dropEnds();
  const file = event.dataTransfer.files[0];
  if (!file) return;
  if (mode === "edit") edit.take(file);
  else restore(file);
});

// --- start ---

byId("model").addEventListener("change", () => {
  edit.fit();
  showSize();
});
startTheme();
startKey();
if (matchMedia("(max-width: 899px)").matches) byId("more").open = false;

choose = startTabs((chosen) => {
  mode = chosen;
  [byId("empty-title").textContent, byId("empty-text").textContent] = EMPTY[mode];
  showSize();
  stage.show(mode);
  if (mode === "compare" && form.models.length) compare.enter();
  showRunning();
});

let loading = null;

/** Take what the server serves. Resolves to whether it answers; if not, the person sees why, and can press Generate again. */
function load() {
  loading ??= (async () => {
    try {
      const { models, adapters } = await catalogue();
      form.start(models, adapters);
      edit.fit();
      choose(mode);
      return true;
    } catch (error) {
      notify(error.message);
      return false;
    } finally {
      loading = null;
    }
  })();
  return loading;
}

gallery.more();
load();
