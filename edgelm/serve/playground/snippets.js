// A request as code: for curl, for Python with OpenAI's client, and for edgelm's command line.

const OPENAI_FIELDS = new Set([
  "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "seed", "stop",
  "frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "top_logprobs",
]);
const KEY = "EDGELM_API_KEY";

/** A word of a POSIX shell. */
export const shellWord = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

/** A value as Python writes it. */
export function pythonValue(value) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return `[${value.map(pythonValue).join(", ")}]`;
  if (typeof value === "object") {
    return `{${Object.entries(value).map(([name, one]) => `${pythonValue(name)}: ${pythonValue(one)}`).join(", ")}}`;
  }
  return JSON.stringify(value);
}

export function curl({ origin, path, body, needsKey }) {
  const lines = [`curl ${origin}${path}`];
  if (needsKey) lines.push(`  -H "Authorization: Bearer $${KEY}"`);
  lines.push(`  --json ${shellWord(JSON.stringify(body, null, 2))}`);
  return lines.join(" \\\n");
}

export function python({ origin, body, needsKey }) {
  const chat = body.messages !== undefined;
  const fields = Object.entries(body);
  const own = fields.filter(([name]) => !OPENAI_FIELDS.has(name));
  const given = fields
    .filter(([name]) => OPENAI_FIELDS.has(name))
    .map(([name, value]) => `    ${name}=${pythonValue(value)},`);
  if (own.length) given.push(`    extra_body=${pythonValue(Object.fromEntries(own))},`);
  return [
    ...(needsKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${pythonValue(`${origin}/v1`)}, api_key=${needsKey ? `os.environ["${KEY}"]` : '"none"'})`,
    `completion = client.${chat ? "chat.completions" : "completions"}.create(`,
    ...given,
    ")",
    "for choice in completion.choices:",
    `    print(choice.${chat ? "message.content" : "text"})`,
  ].join("\n");
}

/** `folder`: the bundle's, or null for the embedded model; `prefix`: the file of its prefix, or null for none. */
export function commandLine({ body, folder, prefix }) {
  const words = ["edgelm run"];
  if (folder !== null) words.push(`-m ${shellWord(folder)}`);
  if (prefix !== null) words.push(`--prefix ${shellWord(prefix)}`);
  words.push("--no-echo");
  for (const [name, value] of Object.entries(body)) {
    if (name !== "model" && name !== "prompt") words.push(...flagsOf(name, value));
  }
  const separator = words.length > 4 ? " \\\n  " : " ";
  // A prompt of "-" or of nothing would have the command read its input, so it gets the prompt there.
  const prompt = body.prompt;
  if (prompt === "-" || prompt === "") return `printf %s ${shellWord(prompt)} | ${words.join(separator)}`;
  return [...words, `${prompt.startsWith("-") ? "-- " : ""}${shellWord(prompt)}`].join(separator);
}

function flagsOf(name, value) {
  const flag = `--${name.replaceAll("_", "-")}`;
  switch (name) {
    case "max_tokens":
      return [`-n ${value}`];
    case "n":
      return [`--num-return-sequences ${value}`];
    case "temperature":
    case "top_p":
      return value === 0 ? ["--greedy"] : [`${flag} ${value}`];
    case "do_sample":
      return [value ? "--do-sample" : "--greedy"];
    case "seed":
      return [`--seed ${BigInt.asUintN(64, BigInt(value))}`];
    case "stop":
      return value.map((text) => `--stop=${shellWord(text)}`);
    case "logprobs":
      return ["--json", `--logprobs ${value}`];
    case "logit_bias":
      return Object.entries(value).map(([id, bias]) => `--logit-bias ${id}=${bias}`);
    case "bad_words_ids":
      return value.map((ids) => `${flag} ${ids.join(",")}`);
    default:
      return [Array.isArray(value) ? `${flag} ${value.join(",")}` : `${flag} ${value}`];
  }
}
