// One request, streamed: its texts, their tokens, and how long they took.

import { streamEvents } from "./api.js";

/** Why a text ended, in words. */
const ENDS = {
  eos: "the model ended it",
  stop: "stop text",
  length: "token limit",
  context: "context is full",
  time: "time limit",
  cancelled: "server stopped",
};

/** Tokens that come within so short a time came in one packet, and say nothing of a rate. */
const LEAST_SECONDS = 0.02;

export class Run {
  /** Send `body` to `path`. `changed` is called when something of the run has changed. */
  constructor(path, body, changed) {
    this.path = path;
    this.body = body;
    this.texts = Array.from({ length: body.n ?? 1 }, () => ({ text: "", tokens: [], end: null }));
    this.hasTokens = body.logprobs !== undefined;
    this.error = null;
    this.state = "waiting"; // then "streaming", then "done", "stopped" or "failed"
    this.usage = null;
    this.pieces = 0;
    this.started = performance.now();
    this.first = null;
    this.last = null;
    this.changed = changed;
    this.abort = new AbortController();
  }

  get running() {
    return this.state === "waiting" || this.state === "streaming";
  }

  /** Seconds from the request to the first token, or null. */
  get firstSeconds() {
    return this.first === null ? null : (this.first - this.started) / 1000;
  }

  /** New tokens of all texts; while they run, and where the user stopped them, the number of pieces that came. */
  get tokenCount() {
    return this.usage?.completion_tokens ?? this.pieces;
  }

  /** Tokens per second after the first one, of all texts together, or null. */
  get rate() {
    const seconds = (this.last - this.first) / 1000;
    return this.tokenCount > 1 && seconds > LEAST_SECONDS ? (this.tokenCount - 1) / seconds : null;
  }

  /** Runs to the end; errors are in `error`. */
  async finish() {
    const body = { ...this.body, stream: true, stream_options: { include_usage: true } };
    try {
      await streamEvents(this.path, body, this.abort.signal, (event) => this.take(event));
      this.state = "done";
    } catch (error) {
      this.state = error.name === "AbortError" ? "stopped" : "failed";
      if (this.state === "failed") this.error = error;
    }
    this.changed(this);
  }

  stop() {
    this.abort.abort();
  }

  take(event) {
    if (event.usage) this.usage = event.usage;
    for (const choice of event.choices) {
      const row = this.texts[choice.index];
      const text = choice.delta ? (choice.delta.content ?? "") : choice.text;
      const tokens = tokensOf(choice.logprobs);
      if (text || tokens.length) {
        this.last = performance.now();
        this.first ??= this.last;
        this.pieces += Math.max(1, tokens.length);
        this.state = "streaming";
      }
      row.text += text;
      row.tokens.push(...tokens);
      if (choice.finish_reason) row.end = ENDS[choice.edgelm_finish_reason] ?? choice.finish_reason;
    }
    this.changed(this);
  }
}

/** Tokens as {text, logprob, top: [{text, logprob}]}, likeliest first, of the two shapes of the API. */
function tokensOf(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map(({ token, logprob, top_logprobs: top }) => ({
      text: token,
      logprob,
      top: top.map((one) => ({ text: one.token, logprob: one.logprob })),
    }));
  }
  return logprobs.tokens.map((text, place) => ({
    text,
    logprob: logprobs.token_logprobs[place],
    top: Object.entries(logprobs.top_logprobs[place])
      .map(([other, logprob]) => ({ text: other, logprob }))
      .sort((one, other) => other.logprob - one.logprob),
  }));
}
