// The tab that continues a prompt, with one model or with two side by side.

import { announce, button, byId, copyButton, growing, tell } from "./dom.js";
import { Result } from "./result.js";
import { Run } from "./run.js";
import { keep, recall } from "./storage.js";

const PATH = "/v1/completions";

export class Complete {
  /** `page` has the models, the options and the view that all tabs share. */
  constructor(page) {
    this.page = page;
    this.results = [];
    this.prompt = byId("prompt");
    this.prompt.value = recall("prompt", "");
    this.fit = growing(this.prompt);
    this.prompt.addEventListener("input", () => {
      keep("prompt", this.prompt.value);
      this.fail("");
    });
    byId("run").addEventListener("click", () => this.start());
    byId("stop").addEventListener("click", () => this.stop());
    byId("code-button").addEventListener("click", () => {
      const body = this.body(this.page.cards()[0]);
      if (body) this.page.showCode(PATH, body);
    });
    this.drawButtons();
  }

  get running() {
    return this.results.some(({ run }) => run.running);
  }

  body(card) {
    const values = this.page.options.values();
    if (values === null) return null;
    const body = { model: card.id, prompt: this.prompt.value, ...values };
    if (this.page.view === "tokens") body.logprobs = this.page.alternatives;
    return body;
  }

  /** Run the prompt with all models shown. */
  start() {
    const bodies = this.page.cards().map((card) => this.body(card));
    if (bodies.includes(null) || !bodies.length) return;
    this.run(bodies);
  }

  run(bodies) {
    this.stop();
    this.fail("");
    this.results = bodies.map((body) => {
      const run = new Run(PATH, body, () => this.changed(result));
      const result = new Result(run, { title: bodies.length > 1 ? body.model : "", view: this.page.view });
      result.actions.append(
        button("Retry", () => this.run(bodies)),
        copyButton(() => run.texts.map((one) => one.text).join("\n\n")),
      );
      if (run.texts.length === 1) {
        result.actions.append(button("Add to prompt", () => this.append(run)));
        result.actions.append(button("Explain", () => this.page.explain(body.model, body.prompt + run.texts[0].text)));
      }
      return result;
    });
    const place = byId("results");
    place.classList.toggle("pair", bodies.length > 1);
    place.replaceChildren(...this.results.map((result) => result.element));
    for (const { run } of this.results) run.finish();
    announce("Running");
    this.drawButtons();
    // The button that was pressed may have gone with the result before.
    if (document.activeElement === document.body) byId("stop").focus();
  }

  changed(result) {
    const { run } = result;
    if (run.running) {
      result.drawSoon();
      return;
    }
    this.blame(run);
    result.draw();
    if (!this.results.includes(result)) return; // another run took its place
    this.drawButtons();
    if (!this.running) announce(this.results.map((one) => summary(one)).join(" "));
  }

  /** Show an error at the field that it names. */
  blame(run) {
    if (!run.error) return;
    if (!this.page.blame(run.error) && run.error.param === "prompt") {
      this.fail(run.error.message);
      run.error = null;
    }
  }

  fail(words) {
    tell(byId("prompt-error"), words);
    if (words) this.prompt.setAttribute("aria-invalid", "true");
    else this.prompt.removeAttribute("aria-invalid");
  }

  stop() {
    for (const { run } of this.results) run.stop();
  }

  append(run) {
    this.prompt.value += run.texts[0].text;
    keep("prompt", this.prompt.value);
    this.fit();
    this.prompt.focus();
    this.prompt.setSelectionRange(this.prompt.value.length, this.prompt.value.length);
  }

  show(view) {
    for (const result of this.results) result.show(view);
  }

  drawButtons() {
    const hadFocus = document.activeElement === byId("stop");
    byId("stop").hidden = !this.running;
    byId("run").textContent = this.running ? "Run again" : "Run";
    if (hadFocus && !this.running) byId("run").focus();
  }
}

/** What a screen reader says of a finished run. */
export function summary({ run }) {
  if (run.error) return ""; // the alert says it
  const rate = run.rate === null ? "" : `, ${Math.round(run.rate)} per second`;
  return `${run.state === "stopped" ? "Stopped" : "Done"}: ${run.tokenCount} tokens${rate}.`;
}
