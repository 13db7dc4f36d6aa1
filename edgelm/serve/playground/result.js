// What came of a run: its texts, as text or as tokens, with its numbers and its error.

import { element, tell } from "./dom.js";
import { tokenList } from "./tokens.js";

export class Result {
  /** `title`: the model's name where several are compared, or "". */
  constructor(run, { title = "", view }) {
    this.run = run;
    this.view = view;
    this.texts = element("div", { class: "texts" });
    this.error = element("p", { class: "alert", role: "alert", hidden: true });
    this.numbers = element("dl", { class: "numbers" });
    /** The place of buttons, which show when the run has ended. */
    this.actions = element("div", { class: "actions" });
    this.element = element(
      "article",
      { class: "result", "aria-label": title ? `Result of ${title}` : "Result" },
      ...(title ? [element("h2", { text: title })] : []),
      this.texts,
      this.error,
      element("div", { class: "result-foot" }, this.numbers, this.actions),
    );
    this.drawn = 0;
    this.build();
  }

  /** Show the texts as "text" or as "tokens". */
  show(view) {
    this.view = view;
    this.build();
  }

  build() {
    const many = this.run.texts.length > 1;
    this.rows = this.run.texts.map((row, number) => {
      const label = many ? `Text ${number + 1}` : "Text";
      const body = this.view === "tokens" && this.run.hasTokens ? tokenBody(row, label) : textBody(row);
      const end = element("p", { class: "ending", hidden: true });
      const head = many ? [element("h3", { class: "over", text: label })] : [];
      return { row, body, end, element: element("div", { class: "one" }, ...head, body.element, end) };
    });
    this.texts.replaceChildren(...this.rows.map((one) => one.element));
    this.draw();
  }

  /** Draw before the next frame what is new; `around` gets the function that draws. */
  drawSoon(around = (draw) => draw()) {
    this.drawn ||= requestAnimationFrame(() => around(() => this.draw()));
  }

  draw() {
    cancelAnimationFrame(this.drawn);
    this.drawn = 0;
    const { run } = this;
    for (const { row, body, end } of this.rows) {
      body.update();
      body.element.classList.toggle("growing", run.running && !row.end);
      tell(end, this.rows.length > 1 && row.end ? `Ended: ${row.end}` : "");
    }
    this.element.setAttribute("aria-busy", String(run.running));
    const missing = this.view === "tokens" && !run.hasTokens && !run.running && run.texts.some((one) => one.text);
    this.element.classList.toggle("without-tokens", missing);
    tell(this.error, run.error?.message);
    const empty = run.state === "failed" && !run.texts.some((one) => one.text);
    this.texts.hidden = empty;
    this.element.hidden = empty && !run.error; // the error shows at the field that it names
    this.actions.hidden = run.running;
    this.drawNumbers(missing);
  }

  drawNumbers(missing) {
    const { run } = this;
    const facts = [];
    if (run.state === "waiting") facts.push(["", "Waiting for the first token…"]);
    if (run.firstSeconds !== null) facts.push(["First token", inSeconds(run.firstSeconds)]);
    if (run.rate !== null) facts.push(["Speed", `${run.rate.toFixed(run.rate < 10 ? 1 : 0)} tokens/s`]);
    const prompt = run.usage ? `, prompt ${run.usage.prompt_tokens}` : "";
    if (run.first !== null) facts.push(["Tokens", `${run.tokenCount}${prompt}`]);
    if (run.state === "stopped") facts.push(["Ended", "you stopped it"]);
    else if (run.state === "done" && this.rows.length === 1) facts.push(["Ended", run.texts[0].end]);
    if (missing) facts.push(["", "Run again to see its tokens"]);
    this.numbers.replaceChildren(
      ...facts.map(([name, value]) =>
        element(
          "div",
          {},
          name ? element("dt", { text: name }) : element("dt", { class: "unseen", text: "State" }),
          element("dd", { text: value }),
        ),
      ),
    );
  }
}

function textBody(row) {
  const node = document.createTextNode("");
  const made = element("div", { class: "text" }, node);
  return { element: made, update: () => node.data !== row.text && (node.data = row.text) };
}

function tokenBody(row, label) {
  const { list, show } = tokenList(`${label}, by tokens; the arrow keys move among them`);
  return { element: list, update: () => show(row.tokens) };
}

const inSeconds = (seconds) => (seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(2)} s`);
