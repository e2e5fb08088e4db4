// Elements without markup in strings: text is always text, so nothing that a server or a file says can become a script.

export const byId = (id) => document.getElementById(id);

/** An element. Properties are set as properties; those with a dash, and role, as attributes. */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name === "class") element.className = value;
    else if (name === "role" || name.includes("-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

/** Say something to screen readers. */
export function announce(text) {
  const live = byId("live");
  live.textContent = "";
  // A region that gets the same text again would stay silent.
  setTimeout(() => { live.textContent = text; }, 50);
}

let hiding;

/** Say something to everyone, for some seconds or until it is dismissed. */
export function notify(text) {
  byId("notice-text").textContent = text;
  byId("notice").hidden = false;
  announce(text);
  clearTimeout(hiding);
  hiding = setTimeout(() => { byId("notice").hidden = true; }, 8000);
}

/** Whether the person agrees to delete something. */
export function confirmed(question) {
  const dialog = byId("confirm");
  byId("confirm-text").textContent = question;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

/** Show or remove what is wrong with a field. */
export function complain(field, message) {
  const problem = byId(field.getAttribute("aria-describedby").split(" ").findLast((id) => id.endsWith("-error")));
  problem.textContent = message ?? "";
  problem.hidden = !message;
  if (message) field.setAttribute("aria-invalid", "true");
  else field.removeAttribute("aria-invalid");
}

export const seconds = (value) => {
  if (value < 9.95) return `${value.toFixed(1)} s`;
  if (value < 90) return `${Math.round(value)} s`;
  return `${Math.round(value / 60)} min`;
};
