// Small things that all parts of the page use.

import { element } from "./elements.js";

export { element };

/** The element with this id. */
export const byId = (id) => document.getElementById(id);

/** Show `words` in `place`, or hide it where there are none. */
export function tell(place, words) {
  place.textContent = words ?? "";
  place.hidden = !words;
}

/** Mark the one of `buttons` whose data attribute `name` is `value` as pressed. */
export function press(buttons, name, value) {
  for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset[name] === value));
}

/** Say `words` to screen readers once they have nothing else to say. */
export function announce(words) {
  byId("status").textContent = words;
}

/** Let a text area be as high as its text. */
export function growing(area) {
  const fit = () => {
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight + 2}px`;
  };
  area.addEventListener("input", fit);
  addEventListener("resize", fit);
  fit();
  return fit;
}

/** A button of little weight. */
export function button(text, click) {
  return element("button", { type: "button", class: "quiet", text, click });
}

/** A button that copies what `textOf()` gives, and says so. */
export function copyButton(textOf) {
  const made = button("Copy", async () => {
    const words = (await copy(textOf())) ? "Copied" : "Not allowed here";
    made.textContent = words;
    announce(words);
    setTimeout(() => (made.textContent = "Copy"), 1500);
  });
  return made;
}

/** Copy `text`; resolves to whether it worked. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Pages of other machines without TLS have no clipboard: the text can still be selected.
    return false;
  }
}
