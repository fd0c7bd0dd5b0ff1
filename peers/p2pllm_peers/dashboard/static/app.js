// The page: asks for the beginning once, then follows the server's events, and draws at most once a second.
// Names come from strangers: everything is put in as text.

import { drawLinks, drawLoss, drawRounds, legend, short } from "./charts.js";

const PHASES = { collecting: "compute", roster: "roster", exchange: "exchange", vote: "vote", commit: "apply" };
const REDRAW_MS = 1000;
const MOST_ROWS = 3000;

const $ = (id) => document.getElementById(id);
const state = { status: null, rounds: null, credits: [], links: { peers: [], pairs: [] }, settings: [], public: true, shown: "", peers: [] };
const stale = new Set();
let drawing = 0, events = null, asked = new URLSearchParams(location.search).get("peer") || "";

function query() {
  return asked ? `?peer=${encodeURIComponent(asked)}` : "";
}

async function begin() {
  try {
    const answer = await fetch(`/api/start${query()}`);
    if (answer.status === 401 || answer.status === 403) {
      return connection("no longer valid: open the address that p2pllm dashboard printed", false);
    }
    if (!answer.ok) throw new Error(String(answer.status));
    Object.assign(state, await answer.json());
  } catch {
    connection("the dashboard does not answer; trying again", false);
    return void setTimeout(begin, 3000);
  }
  choose();
  changed("status", "rounds", "credits", "links", "settings");
  listen();
}

function listen() {
  events?.close();
  events = new EventSource(`/api/events${query()}`);
  events.onopen = () => connection("live", true);
  events.onerror = () => {
    events.close();
    connection("interrupted; trying again", false);
    setTimeout(begin, 2000);
  };
  for (const what of ["status", "credits", "links", "settings"]) {
    events.addEventListener(what, (event) => {
      state[what] = JSON.parse(event.data);
      changed(what);
    });
  }
  events.addEventListener("rounds", (event) => {
    append(state.rounds, JSON.parse(event.data));
    changed("rounds");
  });
}

// Rounds may come again, and other ones in their place when the swarm follows another branch.
function append(rounds, more) {
  const known = rounds.round.findIndex((round) => round >= more.round[0]);
  const kept = known < 0 ? rounds.round.length : known;
  for (const [name, column] of Object.entries(more)) {
    if (name === "parts") {
      for (const [part, values] of Object.entries(column)) push(rounds.parts[part] ??= [], kept, values);
    } else push(rounds[name], kept, column);
  }
}

function push(column, kept, values) {
  column.splice(kept, column.length, ...values);
  if (column.length > MOST_ROWS) column.splice(0, column.length - MOST_ROWS);
}

function changed(...what) {
  what.forEach((each) => stale.add(each));
  drawing ||= setTimeout(draw, document.visibilityState === "visible" && stale.size > 4 ? 0 : REDRAW_MS);
}

function draw() {
  drawing = 0;
  if (stale.has("status")) drawStatus();
  if (stale.has("rounds")) {
    drawLoss($("loss"), state.rounds, $("loss-at"));
    drawRounds($("rounds"), state.rounds);
  }
  if (stale.has("status") || stale.has("links")) drawSwarm();
  if (stale.has("credits")) drawCredits();
  if (stale.has("settings")) drawSettings();
  stale.clear();
}

function drawStatus() {
  const status = state.status, here = state.peers.find((peer) => peer.id === state.shown);
  $("run").textContent = status?.run_name ?? here?.run_name ?? "p2pllm";
  document.title = `${$("run").textContent} · p2pllm`;
  $("where").textContent = here ? `run ${here.run_id}, as ${here.name}` : "";
  banner(status);
  $("mine").hidden = state.public || !status;
  $("phases").replaceChildren(...(status ? phases(status) : []));
  if (!status) return $("numbers").replaceChildren();
  $("progress").value = status.rounds ? status.round / status.rounds : 0;
  $("progress-text").textContent = `round ${status.round} of ${status.rounds}`
    + (status.wanted ? `, ${status.gathered} of ${status.wanted} samples` : "");
  const credit = status.credit ?? { samples: 0, all: 0 };
  const share = credit.all ? ` (${((100 * credit.samples) / credit.all).toFixed(1)}\u00a0%)` : "";
  numbers({
    "loss, nats/token": status.loss?.toFixed(4) ?? "–",
    "validation loss": status.validation_loss?.toFixed(4) ?? "–",
    "tokens/s of the swarm": whole(status.swarm_tokens_per_s),
    "tokens/s of this peer": whole(status.tokens_per_s),
    peers: String(1 + status.peers.length),
    "samples of this peer": `${whole(credit.samples)}${share}`,
    sent: size(status.bytes_sent),
    received: size(status.bytes_received),
    device: status.device || "–",
    "micro-batch": String(status.micro_batch ?? "–"),
  });
  return undefined;
}

function banner(status) {
  const words = [];
  if (!status) words.push("The daemon does not run; `p2pllm join` starts it again. What is shown is from its files.");
  if (status?.trouble) words.push(`Takes no part: ${status.trouble}.`);
  if (status?.paused) words.push(`Paused: ${status.paused}.`);
  if (status && !status.peers.length) words.push("Nobody else is here yet.");
  if (status?.notice) words.push(status.notice);
  else if (status?.worker_restarts) words.push(`The compute process was started again ${status.worker_restarts} times.`);
  $("banner").textContent = words.join(" ");
  $("banner").hidden = !words.length;
}

function phases(status) {
  const names = status.phase in PHASES ? Object.keys(PHASES) : [status.phase, ...Object.keys(PHASES)];
  return names.map((phase) => {
    const item = document.createElement("li");
    const seconds = status.seconds?.[PHASES[phase]];
    item.textContent = seconds ? `${phase} ${seconds.toFixed(1)} s` : phase;
    if (phase === status.phase) {
      item.className = "now";
      item.setAttribute("aria-current", "step");
    }
    return item;
  });
}

function numbers(values) {
  $("numbers").replaceChildren(...Object.entries(values).map(([name, value]) => {
    const box = document.createElement("div"), term = document.createElement("dt"), shown = document.createElement("dd");
    term.textContent = name;
    shown.textContent = value;
    box.append(term, shown);
    return box;
  }));
}

function everybody() {
  const status = state.status;
  if (!status) return [];
  const me = { peer: status.peer_id, phase: status.phase, round: status.round, samples: status.samples,
    tokens_per_s: status.tokens_per_s };
  return [me, ...status.peers];
}

function drawSwarm() {
  const peers = everybody(), me = state.status?.peer_id;
  drawLinks($("links"), peers, state.links, me);
  $("links-say").textContent = state.links.pairs.length
    ? "bytes both ways between two peers since the round before, by the time of the exchange, as they measured it, the smaller of both claims; the wider or stronger, the faster"
    : "no exchange was measured yet; what each peer is doing is in its colour";
  $("peers").replaceChildren(...peers.map((peer) => {
    const row = document.createElement("tr");
    const cells = [`${short(peer.peer)}${peer.peer === me ? " (this)" : ""}`, peer.phase, whole(peer.round),
      whole(peer.samples), whole(peer.tokens_per_s)];
    cells.forEach((text, at) => {
      const cell = row.insertCell();
      cell.textContent = text;
      if (at > 1) cell.className = "n";
    });
    return row;
  }));
}

function drawCredits() {
  const most = Math.max(0.001, ...state.credits.map((credit) => credit.share));
  $("credits").replaceChildren(...state.credits.slice(0, 12).map((credit) => {
    const item = document.createElement("li"), bar = document.createElement("meter");
    const name = document.createElement("span"), text = document.createElement("span");
    name.textContent = short(credit.peer) + (credit.peer === state.status?.peer_id ? " (this)" : "");
    bar.value = credit.share / most;
    bar.setAttribute("aria-label", `share of ${short(credit.peer)}`);
    text.textContent = `${(100 * credit.share).toFixed(1)} %, ${whole(credit.samples)}`;
    item.append(name, bar, text);
    return item;
  }));
  if (state.credits.length > 12) {
    const item = document.createElement("li");
    item.textContent = `${state.credits.length - 12} more`;
    $("credits").append(item);
  }
}

function drawSettings() {
  const form = $("settings");
  if (form.contains(document.activeElement)) return; // nobody's typing is overwritten
  form.replaceChildren(...state.settings.map((setting) => {
    const label = document.createElement("label"), input = document.createElement("input");
    const name = document.createElement("span"), save = document.createElement("button"), help = document.createElement("small");
    name.textContent = setting.name;
    help.textContent = setting.unit_and_meaning;
    save.type = "button";
    save.textContent = "Save";
    input.type = setting.kind === "bool" ? "checkbox" : setting.kind === "number" ? "number" : "text";
    if (input.type === "number") input.step = "any";
    if (input.type === "checkbox") input.checked = setting.value;
    else input.value = setting.value;
    save.onclick = () => post("set", { values: { [setting.name]: input.type === "checkbox" ? String(input.checked) : input.value } });
    label.append(name, document.createElement("span"), input, save, help);
    return label;
  }));
}

// What came of the last action; it stays until the next one, or is dismissed.
function say(words, isError = false) {
  $("said-words").textContent = words;
  $("said").className = isError ? "said bad" : "said";
  $("said").hidden = !words;
}

async function post(what, body) {
  say("");
  try {
    const answer = await fetch(`/api/${what}${query()}`, {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
    const found = await answer.json();
    say(answer.ok ? found.note : found.error, !answer.ok);
  } catch {
    say("The dashboard does not answer; whether it was changed shows when it does.", true);
  }
}

function choose() {
  $("choose").hidden = state.peers.length < 2;
  $("peers-here").replaceChildren(...state.peers.map((peer) => {
    const option = new Option(`${peer.run_name}, ${peer.name}`, peer.id);
    option.selected = peer.id === state.shown;
    return option;
  }));
}

function connection(words, live) {
  $("connection").textContent = words;
  $("connection").className = live ? "pill live" : "pill";
}

function whole(value) {
  return Math.round(value).toLocaleString("en");
}

function size(bytes) {
  let unit = 0;
  while (bytes >= 999.95 && unit < 4) [bytes, unit] = [bytes / 1000, unit + 1];
  return `${bytes.toFixed(unit ? 1 : 0)} ${["B", "kB", "MB", "GB", "TB"][unit]}`;
}

$("peers-here").onchange = (event) => {
  asked = event.target.value;
  begin();
};
$("pause-hour").onclick = () => post("pause", { seconds: 3600 });
$("pause").onclick = () => post("pause", { seconds: null });
$("resume").onclick = () => post("resume", {});
$("said-away").onclick = () => say("");
addEventListener("resize", () => state.rounds && changed("status", "rounds"));
legend($("parts"));
begin();
