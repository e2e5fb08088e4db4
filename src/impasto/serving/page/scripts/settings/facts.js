// Settings in words, for people.

/** Name and value of each setting of an image. */
export function factsOf(settings) {
  const facts = [
    ["Size", `${settings.width} × ${settings.height}`],
    ["Seed", settings.seed],
    ["Steps", settings.steps],
    ["Guidance", settings.guidance],
    ["Scheduler", settings.scheduler],
    ["Model", settings.model],
    ["Adapters", (settings.adapters ?? []).map(({ name, weight }) => `${name} ${weight}`).join(", ")],
    ["Negative prompt", settings.negative],
    ["Edit", settings.edit],
  ];
  return facts.filter(([, value]) => value !== "" && value !== undefined && value !== null).map(([name, value]) => [name, String(value)]);
}

/** Those of the settings that fit into a line. */
export function inWords(settings, names) {
  const words = {
    model: settings.model,
    steps: `${settings.steps} steps`,
    guidance: `guidance ${settings.guidance}`,
    scheduler: settings.scheduler,
    seed: `seed ${settings.seed}`,
    size: `${settings.width} × ${settings.height}`,
    adapters: settings.adapters.map(({ name, weight }) => `${name} ${weight}`).join(", ") || "no adapter",
  };
  return names.filter((name) => name in words).map((name) => words[name]);
}

/** The names of the settings in which two differ. */
export function differences(one, other) {
  const names = { prompt: "prompt", negative: "negative prompt", model: "model", steps: "steps", guidance: "guidance",
    scheduler: "scheduler", seed: "seed" };
  const found = Object.keys(names).filter((name) => String(one[name]) !== String(other[name])).map((name) => names[name]);
  if (one.width !== other.width || one.height !== other.height) found.push("size");
  if (JSON.stringify(one.adapters) !== JSON.stringify(other.adapters)) found.push("adapters");
  return found;
}
