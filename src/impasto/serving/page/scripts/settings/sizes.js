// Sizes that a model can generate, by aspect ratio.

export const ASPECTS = [
  ["1:1", 1, 1], ["4:3", 4, 3], ["3:2", 3, 2], ["16:9", 16, 9], ["3:4", 3, 4], ["2:3", 2, 3], ["9:16", 9, 16],
];

/** Width and height of an aspect ratio with about the model's usual number of pixels, in multiples of what it asks. */
export function sizeOf([, across, down], model) {
  const area = Math.min(model.width * model.height, model.most_pixels);
  const round = (side) => Math.max(model.multiple, Math.round(side / model.multiple) * model.multiple);
  let [width, height] = [round(Math.sqrt((area * across) / down)), round(Math.sqrt((area * down) / across))];
  while (width * height > model.most_pixels || Math.max(width, height) > model.most_side) {
    if (width >= height) width -= model.multiple;
    else height -= model.multiple;
  }
  return { width, height };
}

/** What is wrong with a size, or null. */
export function sizeProblem(width, height, model) {
  if (![width, height].every((side) => Number.isInteger(side) && side >= 1)) return "Give width and height in pixels.";
  if (Math.min(width, height) < model.multiple) return `Each side needs at least ${model.multiple} pixels.`;
  if (Math.max(width, height) > model.most_side) return `Each side has at most ${model.most_side} pixels.`;
  if (width * height > model.most_pixels) {
    const side = Math.floor(Math.sqrt(model.most_pixels));
    return `This model generates at most ${model.most_pixels.toLocaleString("en")} pixels, such as ${side} × ${side}.`;
  }
  return null;
}

/** The nearest size that the model can generate without resizing. */
export function fitted(width, height, model) {
  const scale = Math.min(1, Math.sqrt(model.most_pixels / (width * height)), model.most_side / Math.max(width, height));
  const round = (side) => Math.max(model.multiple, Math.floor((side * scale) / model.multiple) * model.multiple);
  return { width: round(width), height: round(height) };
}
