// Small texts that the browser keeps. What it refuses, because storage is blocked or full, the page holds until it is closed.

/** `area()`: where the browser keeps them; to ask for it may already throw. */
function keeper(area) {
  const held = new Map(); // newer than what the browser has
  return {
    get(name) {
      if (held.has(name)) return held.get(name);
      try {
        return area().getItem(name);
      } catch {
        return null;
      }
    },
    set(name, value) {
      try {
        area().setItem(name, value);
        held.delete(name);
      } catch {
        held.set(name, value);
      }
    },
    remove(name) {
      held.delete(name);
      try {
        area().removeItem(name);
      } catch {
        // Nothing is kept there.
      }
    },
  };
}

export const lasting = keeper(() => localStorage);
export const ofTab = keeper(() => sessionStorage);
