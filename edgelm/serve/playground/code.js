// The dialog that shows a request as code to copy.

import { byId, copy, press } from "./dom.js";
import { commandLine, curl, python } from "./snippets.js";

const dialog = byId("code-dialog");
const buttons = [...dialog.querySelectorAll("[data-code]")];
let request = null;
let language = "curl";

/** Show {path, body, needsKey, folder, prefix}: the last two as `commandLine` takes them. */
export function showCode(shown) {
  request = { ...shown, origin: location.origin };
  draw();
  dialog.showModal();
}

function draw() {
  const chat = request.body.messages !== undefined;
  const cli = buttons.find((button) => button.dataset.code === "cli");
  cli.hidden = chat;
  if (chat && language === "cli") language = "curl";
  press(buttons, "code", language);
  byId("code").textContent = { curl, python, cli: commandLine }[language](request);
  byId("code-note").textContent = note();
  byId("code-copied").textContent = "";
}

function note() {
  const { folder, prefix } = request;
  const key = request.needsKey ? " Put your key into the variable EDGELM_API_KEY first." : "";
  if (language === "python") return `Needs OpenAI's client: pip install openai.${key}`;
  if (language === "curl") return `For a POSIX shell, and curl 7.82 or later.${key}`;
  const places = [];
  if (folder !== null) places.push(`the bundle's folder for ${folder}`);
  if (prefix !== null) places.push(`the prefix file for ${prefix}`);
  if (!places.length) return "For a POSIX shell. It runs the model in the shell, without this server.";
  return `For a POSIX shell. Write ${places.join(", and ")}: this server does not tell where they are.`;
}

for (const button of buttons) {
  button.addEventListener("click", () => {
    language = button.dataset.code;
    draw();
  });
}
byId("code-close").addEventListener("click", () => dialog.close());
byId("code-copy").addEventListener("click", async () => {
  const worked = await copy(byId("code").textContent);
  if (!worked) getSelection().selectAllChildren(byId("code"));
  byId("code-copied").textContent = worked ? "Copied" : "Copying is not allowed here: it is selected, copy it yourself";
});
