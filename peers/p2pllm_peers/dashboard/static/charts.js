// Charts of the dashboard, drawn as SVG from columns of numbers. What does not live here: where the numbers come from.

const SVG = "http://www.w3.org/2000/svg";
const PARTS = ["compute", "roster", "exchange", "vote", "apply", "validation"];
const SHOWN_ROUNDS = 24;
const MOST_POINTS = 600;

function shape(name, attributes, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text) made.textContent = text;
  return made;
}

// One unit of a chart is one pixel of the page, so that its words are as large as others. Returns its width.
function fit(svg, height) {
  const width = Math.max(260, Math.round(svg.clientWidth) || 600);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  return width;
}

function ticks(low, high, count) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((k) => k * power).find((k) => k >= raw);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step / 1e6; at += step) found.push(+at.toFixed(10));
  return found;
}

// The newest rounds as bars, a part of a round a colour, seconds to the right.
export function drawRounds(svg, rounds) {
  const first = Math.max(0, rounds.round.length - SHOWN_ROUNDS), left = 52, width = fit(svg, 260) - left - 16;
  const longest = Math.max(0.1, ...rounds.round_s.slice(first));
  const top = 6, height = (232 - top) / Math.max(1, rounds.round.length - first);
  const shapes = ticks(0, longest, 5).flatMap((s) => {
    const x = left + (s / longest) * width;
    return [shape("line", { x1: x, x2: x, y1: 0, y2: 236, class: "grid" }),
      shape("text", { x, y: 252, "text-anchor": "middle" }, `${s} s`)];
  });
  for (let row = rounds.round.length - 1; row >= first; row--) {
    const y = top + (rounds.round.length - 1 - row) * height;
    let x = left;
    const whole = shape("g", {});
    for (const part of PARTS) {
      const seconds = rounds.parts[part]?.[row] || 0, wide = Math.min((seconds / longest) * width, left + width - x);
      if (wide > 0.2) {
        whole.append(shape("rect", { x, y, width: wide, height: Math.max(2, height - 2), class: css(part) }));
      }
      x += Math.max(0, wide);
    }
    whole.append(shape("title", {}, said(rounds, row)));
    shapes.push(whole);
    const middle = y + height / 2 + 3;
    if (rounds.attempts[row] > 1) shapes.push(shape("text", { x: x + 3, y: middle, class: "again" }, "!"));
    if (height >= 13 || (rounds.round.length - 1 - row) % 2 === 0) {
      shapes.push(shape("text", { x: left - 6, y: middle, "text-anchor": "end" }, String(rounds.round[row])));
    }
  }
  svg.replaceChildren(...shapes);
}

function said(rounds, row) {
  const parts = PARTS.filter((part) => rounds.parts[part]?.[row] > 0)
    .map((part) => `${part} ${rounds.parts[part][row].toFixed(2)} s`);
  const again = rounds.attempts[row] > 1 ? `, ${rounds.attempts[row]} attempts` : "";
  return `round ${rounds.round[row]}: ${rounds.round_s[row].toFixed(2)} s, ${rounds.members[row]} members, `
    + `${rounds.samples[row]} samples${again}: ${parts.join(", ")}`;
}

function css(part) {
  return part === "validation" ? "other" : part;
}

export function legend(element) {
  const keys = PARTS.flatMap((part) => {
    const whole = document.createElement("span"), key = document.createElement("span");
    whole.className = "whole";
    key.className = `key ${css(part)}`;
    whole.append(key, ` ${part}`);
    return [whole, " "];
  });
  element.replaceChildren(...keys, "(the rest of a round was idle, ! marks one of several attempts)");
}

// Training and validation loss by round.
export function drawLoss(svg, rounds, output) {
  const n = rounds.round.length, width = fit(svg, 260), left = 44, right = 12, bottom = 232;
  if (!n) return svg.replaceChildren(shape("text", { x: width / 2, y: 130, "text-anchor": "middle" }, "no round yet"));
  const all = [...rounds.loss, ...rounds.validation_loss].filter((value) => value !== null);
  const low = Math.min(...all), high = Math.max(...all), from = rounds.round[0], to = rounds.round[n - 1];
  const x = (round) => left + ((round - from) / Math.max(1, to - from)) * (width - left - right);
  const y = (loss) => 8 + ((high - loss) / (high - low || 1)) * (bottom - 16);
  const shapes = [];
  for (const loss of ticks(low, high, 5)) {
    shapes.push(shape("line", { x1: left, x2: width - right, y1: y(loss), y2: y(loss), class: "grid" }));
    shapes.push(shape("text", { x: left - 6, y: y(loss) + 4, "text-anchor": "end" }, String(loss)));
  }
  for (const round of ticks(from, to, Math.min(6, Math.floor(width / 80))).filter(Number.isInteger)) {
    const anchor = x(round) > width - right - 16 ? "end" : "middle";
    shapes.push(shape("text", { x: x(round), y: 252, "text-anchor": anchor }, String(round)));
  }
  const step = Math.max(1, Math.ceil(n / MOST_POINTS));
  // A line of one point is a dot: h0, with round ends.
  const line = (values, every) => rounds.round.map((round, row) => [round, values[row], row])
    .filter(([, value, row]) => value !== null && (row % every === 0 || row === n - 1))
    .map(([round, value], at) => `${at ? "L" : "M"}${x(round).toFixed(1)} ${y(value).toFixed(1)}${at ? "" : "h0"}`).join("");
  shapes.push(shape("path", { d: line(rounds.loss, step), class: "training" }));
  shapes.push(shape("path", { d: line(rounds.validation_loss, 1), class: "validation" }));
  const at = shape("line", { y1: 8, y2: bottom, class: "at", visibility: "hidden" });
  svg.replaceChildren(...shapes, at);
  svg.onpointermove = (event) => {
    const box = svg.getBoundingClientRect(), wanted = ((event.clientX - box.left) / box.width) * width;
    let row = 0;
    while (row < n - 1 && x(rounds.round[row]) < wanted) row++;
    at.setAttribute("x1", x(rounds.round[row]));
    at.setAttribute("x2", x(rounds.round[row]));
    at.setAttribute("visibility", "visible");
    const validation = rounds.validation_loss[row]?.toFixed(4);
    output.textContent = `· round ${rounds.round[row]}: ${rounds.loss[row]?.toFixed(4) ?? "no number"}`
      + (validation ? `, validation ${validation}` : "");
  };
  svg.onpointerleave = () => {
    at.setAttribute("visibility", "hidden");
    output.textContent = "";
  };
}

const MOST_IN_CIRCLE = 24;

// Who exchanges how fast with whom: peers in a circle with lines between them, or where they are many, a square with a
// field for each two of them. What shows links is made anew only where a link, a peer or the width changed, as 64 peers
// have four thousand fields.
export function drawLinks(svg, peers, links, me) {
  const width = fit(svg, 320), ids = peers.map((peer) => peer.peer), many = peers.length > MOST_IN_CIRCLE;
  const place = many ? inSquare(ids, width) : inCircle(ids, width);
  const drawn = [width, ...ids].join();
  if (svg.links !== links || svg.drawn !== drawn) {
    svg.links = links;
    svg.drawn = drawn;
    svg.pairs = many ? fields(links, place) : lines(links, place);
  }
  const nodes = peers.map((peer) => {
    const { x, y, r } = place.get(peer.peer);
    const kind = peer.peer === me ? "me" : peer.phase === "collecting" || peer.phase === "exchange" ? "busy" : "";
    const made = shape("circle", { cx: x, cy: y, r, class: `node ${kind}` });
    made.append(shape("title", {}, `${short(peer.peer)}: ${peer.phase}, ${Math.round(peer.tokens_per_s)} tokens/s`));
    return made;
  });
  const names = many ? [] : ids.map((id) => {
    const { x, y, turn } = place.get(id), beside = Math.cos(turn);
    const anchor = Math.abs(beside) < 0.3 ? "middle" : beside > 0 ? "start" : "end";
    return shape("text", { x: x + 13 * beside, y: y + 4 + 18 * Math.sin(turn), "text-anchor": anchor, class: "name" },
      short(id));
  });
  svg.replaceChildren(svg.pairs, ...nodes, ...names);
}

function inCircle(ids, width) {
  const across = Math.min(200, width / 2 - 72);
  return new Map(ids.map((id, at) => {
    const turn = (2 * Math.PI * at) / ids.length - Math.PI / 2;
    return [id, { x: width / 2 + across * Math.cos(turn), y: 160 + 125 * Math.sin(turn), r: 9, turn }];
  }));
}

function inSquare(ids, width) {
  const side = Math.min(width, 320) / ids.length;
  return new Map(ids.map((id, at) =>
    [id, { x: (width - side * ids.length) / 2 + (at + 0.5) * side, y: (at + 0.5) * side, r: 0.45 * side, side }]));
}

// [place of one, place of the other, share of the fastest, what it says] of each pair whose both peers are there.
function known(links, place) {
  const fastest = Math.max(0.001, ...links.pairs.map((pair) => pair[2]));
  return links.pairs.flatMap(([one, other, mbit, sayers]) => {
    const [from, to] = [links.peers[one], links.peers[other]];
    const whose = sayers > 1 ? "the smaller of both claims" : "one of them says so";
    const says = `${short(from)} and ${short(to)}: ${mbit} Mbit/s, ${whose}`;
    return place.has(from) && place.has(to) ? [[place.get(from), place.get(to), mbit / fastest, says]] : [];
  });
}

function lines(links, place) {
  const group = shape("g", {});
  for (const [from, to, share, says] of known(links, place)) {
    const line = shape("line", { x1: from.x, y1: from.y, x2: to.x, y2: to.y, class: "link", "stroke-width": 1 + 7 * share });
    line.append(shape("title", {}, says));
    group.append(line);
  }
  return group;
}

function fields(links, place) {
  const group = shape("g", {});
  for (const [one, other, share, says] of known(links, place)) {
    for (const [column, row] of [[one, other], [other, one]]) {
      const field = shape("rect", { x: column.x - column.side / 2, y: row.y - row.side / 2, width: column.side,
        height: row.side, class: "field", "fill-opacity": (0.1 + 0.9 * Math.sqrt(share)).toFixed(2) });
      field.append(shape("title", {}, says));
      group.append(field);
    }
  }
  return group;
}

export function short(peer) {
  return peer.slice(-8);
}
