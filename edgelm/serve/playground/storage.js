// What a reload of this tab keeps. Nothing of it outlives the tab.

const PLACE = "edgelm.playground";
const KEY_PLACE = "edgelm.key";

function read(place) {
  try {
    return sessionStorage.getItem(place);
  } catch {
    return null; // storage is switched off
  }
}

function write(place, text) {
  try {
    if (text === null) sessionStorage.removeItem(place);
    else sessionStorage.setItem(place, text);
  } catch {
    // storage is switched off or full: a reload loses what was written
  }
}

function kept() {
  try {
    const found = JSON.parse(read(PLACE) ?? "{}");
    return typeof found === "object" && found !== null && !Array.isArray(found) ? found : {};
  } catch {
    return {};
  }
}

const values = kept();

/** What was kept under `name`, or `otherwise`. */
export function recall(name, otherwise) {
  const value = values[name];
  return typeof value === typeof otherwise && Array.isArray(value) === Array.isArray(otherwise) ? value : otherwise;
}

/** Keep `value` under `name`. */
export function keep(name, value) {
  values[name] = value;
  write(PLACE, JSON.stringify(values));
}

let key = read(KEY_PLACE) ?? "";

/** The API key, or "". */
export const apiKey = () => key;

/** Use this API key, in this tab. */
export function useApiKey(text) {
  key = text;
  write(KEY_PLACE, text || null);
}
