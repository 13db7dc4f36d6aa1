// Elements are made of text and properties, never of HTML.

/** A new element. `properties` are attributes, except `text`, `class` and functions, which listen to events. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") made.textContent = value;
    else if (typeof value === "function") made.addEventListener(name, value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

/** The arrow keys, Home and End move the focus among the options of `list`, which is one stop of the Tab key. */
export function moveByArrows(list) {
  const options = () => [...list.querySelectorAll("[role=option]")];
  list.addEventListener("focusin", (event) => {
    const option = event.target.closest?.("[role=option]");
    if (!option) return;
    for (const other of options()) other.tabIndex = other === option ? 0 : -1;
  });
  list.addEventListener("keydown", (event) => {
    const option = event.target.closest?.("[role=option]");
    const all = options();
    const place = all.indexOf(option);
    const next = {
      ArrowRight: () => all[place + 1],
      ArrowLeft: () => all[place - 1],
      ArrowDown: () => inNextLine(all, place, 1),
      ArrowUp: () => inNextLine(all, place, -1),
      Home: () => all[0],
      End: () => all.at(-1),
    }[event.key];
    if (!next || place < 0) return;
    event.preventDefault();
    next()?.focus();
  });
}

/** The option nearest to the middle of the one at `place` in the line below (`step` 1) or above (-1). */
function inNextLine(all, place, step) {
  const from = all[place].getBoundingClientRect();
  const middle = (from.left + from.right) / 2;
  let best = null;
  let line = null;
  for (let at = place + step; all[at]; at += step) {
    const box = all[at].getClientRects()[0];
    if (!box || Math.abs(box.top - from.top) < 4) continue;
    line ??= box.top;
    if (Math.abs(box.top - line) > 4) break;
    const distance = Math.abs((box.left + box.right) / 2 - middle);
    if (best === null || distance < best.distance) best = { option: all[at], distance };
  }
  return best?.option;
}
