// Chat with two models of this server, or with one model with and without its stages, side by side.
"use strict";

const find = (name) => document.getElementById(name);
let token = "";
let columns = [];
let running = null; // what stops the answers under way

class Column {
  constructor(models, number) {
    const part = find("column").content.cloneNode(true);
    this.section = part.querySelector("section");
    this.section.setAttribute("aria-label", number ? "Second model" : "First model");
    this.select = part.querySelector("select");
    this.stages = part.querySelector(".stages");
    this.log = part.querySelector("ol");
    this.figures = part.querySelector(".figures");
    this.models = new Map(models.map((model) => [model.id, model]));
    for (const model of models) this.select.append(new Option(model.id, model.id));
    if (number) this.select.append(new Option("none", ""));
    this.turns = [];
    this.select.addEventListener("change", () => { this.offer(true); this.reset(); });
    find("columns").append(part);
  }

  // The stages of the chosen model, each to be switched off.
  offer(on) {
    const names = this.models.get(this.select.value)?.gossamer?.stages ?? [];
    this.stages.replaceChildren(...names.map((name) => {
      const label = document.createElement("label");
      const box = Object.assign(document.createElement("input"), { type: "checkbox", name, checked: on });
      label.append(box, name);
      return label;
    }));
  }

  choose(model, on) {
    this.select.value = model;
    this.offer(on);
  }

  reset() {
    this.turns = [];
    this.log.replaceChildren();
    this.figures.textContent = "";
  }

  show(role, text) {
    const line = document.createElement("li");
    line.className = role;
    const who = Object.assign(document.createElement("span"), { className: "who" });
    who.textContent = { user: "you", assistant: this.select.value, wrong: "error" }[role];
    const words = document.createElement("span");
    words.textContent = text;
    line.append(who, words);
    this.log.append(line);
    line.scrollIntoView({ block: "nearest" });
    return words;
  }

  body(text) {
    const off = [...this.stages.querySelectorAll("input")].filter((box) => !box.checked).map((box) => [box.name, false]);
    const body = {
      model: this.select.value,
      messages: [...this.turns, { role: "user", content: text }],
      temperature: Number(find("temperature").value),
      max_tokens: Number(find("most").value),
      stream: true,
      stream_options: { include_usage: true },
    };
    return off.length ? { ...body, gossamer: { stages: Object.fromEntries(off) } } : body;
  }

  // Ask, and show the answer as it comes. What was said before a stop or an error stays in the history.
  async ask(text, signal) {
    const body = this.body(text);
    this.show("user", text);
    this.figures.textContent = "waiting";
    this.log.setAttribute("aria-busy", "true"); // readers wait for the whole answer
    const clock = new Clock();
    let said = "", words = null;
    try {
      for await (const event of events(body, signal)) {
        if (event.usage) clock.usage = event.usage;
        const piece = event.choices?.[0]?.delta?.content;
        if (!piece) continue;
        clock.tick();
        words ??= this.show("assistant", "");
        words.append(piece);
        said += piece;
        this.log.scrollTop = this.log.scrollHeight;
        this.figures.textContent = clock.text();
      }
      clock.over = true;
    } catch (error) {
      if (error.name !== "AbortError") this.show("wrong", error.message);
    }
    this.figures.textContent = clock.text();
    this.log.removeAttribute("aria-busy");
    // an exchange without an answer would break the order of the turns
    if (said || clock.over) this.turns.push({ role: "user", content: text }, { role: "assistant", content: said });
  }
}

class Clock {
  constructor() {
    this.began = performance.now();
    this.pieces = 0;
    this.usage = null;
    this.over = false;
  }

  tick() {
    this.last = performance.now();
    this.first ??= this.last;
    this.pieces += 1;
  }

  text() {
    const parts = [], tokens = this.usage?.completion_tokens;
    const count = tokens ?? this.pieces;
    if (count > 1 && this.last > this.first) {
      parts.push(`${(1000 * (count - 1) / (this.last - this.first)).toFixed(1)} tokens/s`);
    }
    if (this.first) parts.push(`first after ${(this.first - this.began).toFixed(0)} ms`);
    if (tokens !== undefined) parts.push(`${tokens} tokens`);
    for (const [name, stage] of Object.entries(this.usage?.gossamer?.stages ?? {})) {
      parts.push(`${name} ${stage.ms.toFixed(1)} ms`);
    }
    return parts.join(" · ") || (this.over ? "no text" : "stopped");
  }
}

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function call(path, options = {}) {
  const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  const reply = await fetch(path, { ...options, headers, credentials: "omit" });
  if (reply.ok) return reply;
  const told = await reply.json().catch(() => null);
  throw new Refused(reply.status, told?.error?.message ?? `the server answered ${reply.status}`);
}

// The events of a streamed answer; an error among them is thrown.
async function* events(body, signal) {
  const options = { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" }, signal };
  const reply = await call("/v1/chat/completions", options);
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the answer broke off");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines.map((one) => one.trim())) {
      if (!line.startsWith("data:")) continue;
      const text = line.slice(5).trim();
      if (text === "[DONE]") return;
      const event = JSON.parse(text);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function notice(text) {
  find("notice").textContent = text;
  find("notice").hidden = !text;
}

async function start() {
  let models;
  try {
    models = (await (await call("/v1/models")).json()).data;
  } catch (error) {
    find("unlock").hidden = error.status !== 401;
    notice(error.status === 401 && !token ? "This server asks for its token." : error.message);
    if (error.status === 401) find("token").focus();
    return;
  }
  models = models.filter((model) => model.gossamer?.kind !== "embedding");
  find("unlock").hidden = true;
  notice(models.length ? "" : "This server has no model to talk with.");
  if (!models.length) return;
  find("columns").replaceChildren();
  columns = [new Column(models, 0), new Column(models, 1)];
  columns[0].choose(models[0].id, true);
  // beside it another model, else the same without its stages
  const same = models[0].gossamer?.stages?.length ? models[0].id : "";
  columns[1].choose(models[1]?.id ?? same, models.length > 1);
  find("send").disabled = false;
  find("ask").focus();
}

function busy(on) {
  find("send").disabled = find("reset").disabled = on;
  find("stop").disabled = !on;
  for (const field of find("columns").querySelectorAll("select, input")) field.disabled = on;
}

find("talk").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = find("ask").value.trim();
  if (!text || running || !columns.length) return;
  find("ask").value = "";
  running = new AbortController();
  busy(true);
  await Promise.all(columns.filter((column) => column.select.value).map((column) => column.ask(text, running.signal)));
  running = null;
  busy(false);
  find("ask").focus();
});

find("ask").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    find("talk").requestSubmit();
  }
});

find("stop").addEventListener("click", () => running?.abort());
find("reset").addEventListener("click", () => columns.forEach((column) => column.reset()));
find("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  token = find("token").value;
  start();
});

start();
