// The history: images with their settings in IndexedDB, newest first. It never leaves this browser.

const MOST = 1000;
let opening;

function database() {
  opening ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("impasto", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("images", { keyPath: "id", autoIncrement: true });
    request.onsuccess = () => {
      const { result } = request;
      // The person clears the site's data, or another tab deletes it: the next use opens it again.
      result.onclose = forget;
      result.onversionchange = () => {
        result.close();
        forget();
      };
      resolve(result);
    };
    request.onerror = () => reject(request.error);
  });
  opening.catch(forget);
  return opening;
}

const forget = () => { opening = undefined; };

const result = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

/** The result of a request that changes something, once it is kept: a full disk is found out after the request. */
const kept = (request) =>
  new Promise((resolve, reject) => {
    const fail = ({ target }) => reject(target.error);
    Object.assign(request.transaction, { oncomplete: () => resolve(request.result), onabort: fail, onerror: fail });
  });

const store = async (mode) => (await database()).transaction("images", mode).objectStore("images");

/** Keep `{blob, settings, seconds, time}`, and forget the oldest beyond the limit. Returns the entry with its id. */
export async function keep(entry) {
  const id = await kept((await store("readwrite")).add(entry));
  await forgetOldest().catch(() => {}); // the new one is kept all the same
  return { ...entry, id };
}

async function forgetOldest() {
  const images = await store("readwrite");
  let excess = (await result(images.count())) - MOST;
  if (excess > 0) {
    images.openCursor().onsuccess = ({ target: { result: cursor } }) => {
      if (!cursor || excess-- <= 0) return;
      cursor.delete();
      cursor.continue();
    };
  }
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

export const remove = async (id) => kept((await store("readwrite")).delete(id));
export const clear = async () => kept((await store("readwrite")).clear());
