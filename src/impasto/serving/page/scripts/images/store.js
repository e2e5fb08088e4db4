// The history: images with their settings in IndexedDB, newest first. It never leaves this browser.

const MOST = 1000;
let opening;

function database() {
  opening ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("impasto", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("images", { keyPath: "id", autoIncrement: true });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opening;
}

const result = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

const store = async (mode) => (await database()).transaction("images", mode).objectStore("images");

/** Keep `{blob, settings, seconds, time}`, and forget the oldest beyond the limit. Returns the entry with its id. */
export async function keep(entry) {
  const id = await result((await store("readwrite")).add(entry));
  const images = await store("readwrite");
  let excess = (await result(images.count())) - MOST;
  if (excess > 0) {
    images.openCursor().onsuccess = ({ target: { result: cursor } }) => {
      if (!cursor || excess-- <= 0) return;
      cursor.delete();
      cursor.continue();
    };
  }
  return { ...entry, id };
}

/** Up to `count` entries older than the id `before`, newest first. */
export async function older(before, count) {
  const range = before === null ? null : IDBKeyRange.upperBound(before, true);
  const request = (await store("readonly")).openCursor(range, "prev");
  return new Promise((resolve, reject) => {
    const found = [];
    request.onerror = () => reject(request.error);
    request.onsuccess = () => {
      const cursor = request.result;
      if (!cursor || found.length === count) return resolve(found);
      found.push(cursor.value);
      return cursor.continue();
    };
  });
}

export const remove = async (id) => result((await store("readwrite")).delete(id));
export const clear = async () => result((await store("readwrite")).clear());
