// The page: shows what the server tells, and sends what the buttons say.
const $ = (id) => document.getElementById(id);
const losses = new Map(); // round -> loss

function showStatus(status) {
  const title = status ? `${status.run_name}: ${status.name}` : "p2pllm";
  $("title").textContent = document.title = title;
  $("state").textContent = status
    ? `${status.paused ? "paused " + status.paused : status.phase}, round ${status.round}, ${status.peers.length + 1} peers`
    : "The daemon of this peer does not run.";
}

function showRounds(rounds) {
  rounds.round.forEach((round, at) => losses.set(round, rounds.loss[at]));
  const points = [...losses].sort((a, b) => a[0] - b[0]);
  if (points.length < 2) return;
  const values = points.map(([, loss]) => loss);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const [first, last] = [points[0][0], points.at(-1)[0]];
  const place = ([round, loss]) =>
    `${(600 * (round - first)) / (last - first)},${155 - (150 * (loss - low)) / (high - low || 1)}`;
  document.querySelector("#loss polyline").setAttribute("points", points.map(place).join(" "));
}

function showCredits(credits) {
  $("credits").replaceChildren(...credits.map((credit) => {
    const row = document.createElement("tr");
    for (const text of [credit.peer, credit.samples, `${(100 * credit.share).toFixed(1)} %`, credit.rounds]) {
      row.insertCell().textContent = text;
    }
    return row;
  }));
}

async function send(what, body) {
  const headers = { "Content-Type": "application/json" };
  const response = await fetch(`/api/${what}`, { method: "POST", headers, body: JSON.stringify(body) });
  const answer = await response.json();
  $("note").textContent = answer.note ?? answer.error;
}

const start = await (await fetch("/api/start")).json();
showStatus(start.status);
showRounds(start.rounds);
showCredits(start.credits);
$("controls").hidden = start.public;
$("pause").onclick = () => send("pause", { seconds: null });
$("resume").onclick = () => send("resume", {});
const after = start.rounds.round.at(-1) ?? 0;
const events = new EventSource(`/api/events?after=${after}&peer=${encodeURIComponent(start.shown)}`);
const shown = { status: showStatus, rounds: showRounds, credits: showCredits };
for (const [name, show] of Object.entries(shown)) {
  events.addEventListener(name, (event) => show(JSON.parse(event.data)));
}
