// The key of a server that asks for one: kept for this tab, sent to this server.

import { byId, complain } from "../dom.js";
import { ofTab } from "../storage.js";

const NAME = "impasto-key";

export const authorization = () => {
  const key = ofTab.get(NAME);
  return key ? { Authorization: `Bearer ${key}` } : {};
};

/** Ask for the key; `wrong`: the one that was given is not valid. */
export function askForKey(wrong) {
  ofTab.remove(NAME);
  const [dialog, field] = [byId("key-dialog"), byId("key")];
  complain(field, wrong ? "This key is not valid." : null);
  field.value = "";
  if (!dialog.open) dialog.showModal();
  field.focus();
  return new Promise((resolve) => {
    byId("key-form").onsubmit = (event) => {
      const key = field.value.trim();
      if (!/^[\x21-\x7e]+$/.test(key)) {
        event.preventDefault();
        complain(field, "Type the key.");
        return;
      }
      ofTab.set(NAME, key);
      resolve();
    };
  });
}

export function startKey() {
  const dialog = byId("key-dialog");
  dialog.addEventListener("cancel", (event) => event.preventDefault());
  dialog.addEventListener("close", () => {
    // Browsers close it all the same when Escape is pressed twice; requests still wait for the key.
    if (!ofTab.get(NAME) && !dialog.open) dialog.showModal();
  });
  byId("forget-key").addEventListener("click", () => {
    ofTab.remove(NAME);
    location.reload();
  });
}

export const showForget = () => { byId("forget-key").hidden = !ofTab.get(NAME); };
