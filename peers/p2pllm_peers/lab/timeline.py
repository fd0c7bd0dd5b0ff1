"""What happens when: a scenario's joins, events, their opposites and its churn as one list, the same for a seed.

Pure. What does not live here: which fields an event takes (`checks`), and carrying it out (`faults`).

| do                      | args                                                                                |
|-------------------------|-------------------------------------------------------------------------------------|
| join                    | {}; a peer with `start_s` above 0                                                   |
| kill, stop              | {}                                                                                  |
| restart                 | keep_disk: bool, False: with an empty disk                                          |
| freeze, thaw            | {}                                                                                  |
| cut, mend               | other: the peer at the far end of the path, the later name; "" for the whole line   |
| partition               | groups: lists of names that hold every peer of the scenario once; `peer` is ""      |
| heal                    | {}; `peer` is ""                                                                    |
| slow_link, restore_link | link: all fields of the `Link` that holds from now on, its delay one number         |
| slow_machine            | cores: its share of a core from now on, 0 without limit; its opposite is itself     |
| fill_disk, free_disk    | {}                                                                                  |
| pause, resume           | {}                                                                                  |
| corrupt                 | file: pattern under the peer's folder                                               |

Events that wait for a phase come last in the list, in the order of the file, each followed by what undoes it: when and
whom they strike is not known before (`aiming`). Until then their args are what the file says, without what depends on
the victim.

A peer is touched from an event until its opposite, and until it has joined; "any" and churn only meet peers that
nothing else touches from the beginning to the end of the fault. Whatever is due at the end or later is left out: an
event that would be undone then stays. Churn is undone `calm_s` before the end at the latest, so that it never does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from p2pllm.errors import UsageError
from p2pllm_peers.lab.evidence import Strike
from p2pllm_peers.lab.scenario import ANYONE, OPPOSITE, Event, PeerSpec, Scenario

_UNDOES = frozenset(OPPOSITE.values()) - {"slow_machine"}
_STATE = {
    "kill": "down", "stop": "down", "freeze": "frozen", "cut": "cut off", "partition": "partitioned",
    "slow_link": "on a slowed link", "slow_machine": "slowed", "fill_disk": "without disk space",
    "pause": "paused",
}  # fmt: skip
_BEFORE, _JOIN, _AFTER = 0, 1, 2  # at one moment whatever ends comes before whatever begins


@dataclass(frozen=True)
class _Move:
    """A strike to be, where it stands in the file, and whether it undoes another."""

    strike: Strike
    place: str
    undoes: bool

    @property
    def order(self) -> tuple[float, int]:
        rank = _BEFORE if self.undoes else _JOIN if self.strike.do == "join" else _AFTER
        return self.strike.at_s, rank


@dataclass(frozen=True)
class _Span:
    """One peer is touched from `start` until `end`, seconds."""

    peer: str
    start: float
    end: float


def timeline(scenario: Scenario) -> list[Strike]:
    """All that happens, in order of time, then what waits for a phase. At one moment ends come first, then joins,
    events, and churn.

    The same scenario gives the same list on every machine, and another event does not move the churn, but for
    faults that meet it. Raises UsageError, naming the event, if one undoes what is not or does what is already.
    """
    specs = {spec.name: spec for spec in scenario.peer_specs()}
    moves = [_Move(_strike(s.start_s, "join", s.name), "", False) for s in specs.values() if s.start_s > 0]
    numbered = [(_place(number, event), event) for number, event in enumerate(scenario.events, 1) if not event.phase]
    for place, event in numbered:
        if event.peer != ANYONE:
            moves += _moves(event, event.peer, place, specs)
    spans = _walk(sorted(moves, key=lambda move: move.order), specs)
    seen: dict[str, int] = {}
    for place, event in sorted(numbered, key=lambda item: item[1].at_s):
        if event.peer == ANYONE:
            peer = _draw(scenario, event, place, specs, spans, seen)
            drawn = _moves(event, peer, place, specs)
            moves += drawn
            spans.append(_Span(peer, drawn[0].strike.at_s, _until(event)))
    moves += _churn(scenario, spans)
    end = scenario.duration_s or math.inf
    planned = [move.strike for move in sorted(moves, key=lambda move: move.order) if move.strike.at_s < end]
    for event in scenario.events:
        if event.phase:
            planned += _waiting(event, len(planned))
    return planned


def aimed_at(strike: Strike, victim: PeerSpec) -> Strike:
    """A strike that waited for a phase, or undoes such a one, on the victim that was found."""
    args = dict(strike.args)
    if strike.do in ("slow_link", "restore_link"):
        args["link"] = (victim.link.model_dump() if victim.link else {}) | args.get("link", {})
    if strike.do == "slow_machine":
        args.setdefault("cores", victim.cores)
    return strike.model_copy(update={"peer": victim.name, "args": args})


def _waiting(event: Event, index: int) -> list[Strike]:
    """The event, which is number `index` in the list, and what undoes it."""
    args = {"link": event.link} if event.do == "slow_link" else _args(event, event.do, event.peer, {})
    strike = Strike(at_s=_ms(event.after_s), do=event.do, peer=event.peer, args=args, phase=event.phase)
    if not event.for_s or event.do not in OPPOSITE:
        return [strike]
    do = OPPOSITE[event.do]
    args = _args(event, do, event.peer, {}) if do in ("restart", "mend") else {}
    return [strike, Strike(at_s=_ms(event.after_s + event.for_s), do=do, peer=event.peer, args=args, undoes=index)]


def _place(number: int, event: Event) -> str:
    until = f" for {event.for_s:g} s" if event.for_s else ""
    return f"[[events]] {number} ({event.do} at {event.at_s:g} s{until})"


def _until(event: Event) -> float:
    if event.do not in OPPOSITE:
        return _ms(event.at_s)  # a flipped bit has no end, and touches for a moment
    return _ms(event.at_s + event.for_s) if event.for_s else math.inf


def _ms(seconds: float) -> float:
    """Whole milliseconds, so that the last bits of a machine's logarithm do not show."""
    return round(seconds, 3)


def _strike(at_s: float, do: str, peer: str, **args: Any) -> Strike:
    return Strike(at_s=_ms(at_s), do=do, peer=peer, args=args)


def _moves(event: Event, peer: str, place: str, specs: dict[str, PeerSpec]) -> list[_Move]:
    """The event on `peer` and, if it has an end, its opposite."""
    if event.other:  # a path is one and the same from both its ends
        peer, other = sorted((peer, event.other))
        event = event.model_copy(update={"other": other})
    begin = _strike(event.at_s, event.do, peer, **_args(event, event.do, peer, specs))
    moves = [_Move(begin, place, event.do in _UNDOES)]
    if event.for_s and event.do in OPPOSITE:
        do = OPPOSITE[event.do]
        before = event.model_copy(update={"cores": specs[peer].cores}) if do == "slow_machine" else event
        end = _strike(event.at_s + event.for_s, do, peer, **_args(before, do, peer, specs))
        moves.append(_Move(end, f"the end of {place}", True))
    return moves


def _args(event: Event, do: str, peer: str, specs: dict[str, PeerSpec]) -> dict[str, Any]:
    if do == "restart":
        return {"keep_disk": event.keep_disk}
    if do in ("cut", "mend"):
        return {"other": event.other}
    if do == "partition":
        named = [list(group) for group in event.groups]
        rest = [name for name in specs if not any(name in group for group in named)]
        return {"groups": [*named, rest] if rest else named}
    if do in ("slow_link", "restore_link"):
        link = specs[peer].link
        return {"link": (link.model_dump() if link else {}) | (event.link if do == "slow_link" else {})}
    if do == "slow_machine":
        return {"cores": event.cores}
    return {"file": event.file} if do == "corrupt" else {}


def _walk(moves: list[_Move], specs: dict[str, PeerSpec]) -> list[_Span]:
    """Go through what is named in order of time: who is touched when. Raises UsageError at the first contradiction."""
    spans = [_Span(spec.name, -math.inf, spec.start_s) for spec in specs.values() if spec.start_s > 0]
    since: dict[tuple[str, str, str], float] = {}  # (peer, other, state) -> when it began

    def close(key: tuple[str, str, str], at_s: float) -> None:
        begun = since.pop(key)
        who = specs if key[2] == "partitioned" else [name for name in key[:2] if name]
        spans.extend(_Span(name, begun, at_s) for name in who)

    for move in moves:
        strike = move.strike
        if strike.do == "join":
            continue
        key = _key(strike)
        _check(move, key, since, specs)
        if move.undoes:
            close(key, strike.at_s)
        elif strike.do in _STATE:
            since[key] = strike.at_s
            if strike.do == "kill" and (frozen := (strike.peer, "", "frozen")) in since:
                close(frozen, strike.at_s)
        else:
            spans.append(_Span(strike.peer, strike.at_s, strike.at_s))
    for key in list(since):
        close(key, math.inf)
    return spans


def _key(strike: Strike) -> tuple[str, str, str]:
    """What is touched, and the state that the strike begins or ends."""
    begins = next((do for do, undo in OPPOSITE.items() if undo == strike.do), strike.do)
    return strike.peer, strike.args.get("other", ""), _STATE.get(begins, "")


def _check(
    move: _Move, key: tuple[str, str, str], since: dict[tuple[str, str, str], float], specs: dict[str, PeerSpec]
) -> None:
    strike, who = move.strike, move.strike.peer or "the network"
    down, frozen = (strike.peer, "", "down") in since, (strike.peer, "", "frozen") in since
    problem, advice = "", "take another time or peer"
    if strike.peer and specs[strike.peer].start_s > strike.at_s:
        problem = f"{who} joins only at {specs[strike.peer].start_s:g} s"
    elif move.undoes and key not in since:
        problem = f"{who} is not {key[2]} then"
    elif not move.undoes and key in since:
        problem, advice = f"{who} is {key[2]} already", "end that first, for example by its for_s"
    elif strike.do in ("stop", "freeze", "pause") and (down or frozen):
        problem = f"{who} is {'down' if down else 'frozen'} then"
    if problem:
        raise UsageError(f"{move.place}: {problem}; {advice}")


def _free(names: Iterable[str], spans: list[_Span], start: float, end: float) -> list[str]:
    """Of `names`, those whom nothing touches from `start` to `end`, both included."""
    met = {span.peer for span in spans if span.start <= end and start < span.end}
    return [name for name in names if name not in met]


def _draw(
    scenario: Scenario,
    event: Event,
    place: str,
    specs: dict[str, PeerSpec],
    spans: list[_Span],
    seen: dict[str, int],
) -> str:
    """Whom an event on "any" befalls. Other events do not change who comes first, only who is free."""
    able = [
        name
        for name, spec in specs.items()
        if name != event.other and (spec.disk_mb or event.do != "fill_disk") and (spec.link or event.do != "slow_link")
    ]
    purpose = f"any/{event.do}/{event.at_s:.3f}"
    seen[purpose] = seen.get(purpose, 0) + 1
    ranking = _ranking(scenario, f"{purpose}/{seen[purpose]}", specs)
    free = _free(able, spans, _ms(event.at_s), _until(event))
    if not free:
        raise UsageError(f"{place}: there is no peer that nothing else touches meanwhile; name one, or change the time")
    return min(free, key=ranking.__getitem__)


def _ranking(scenario: Scenario, purpose: str, names: Iterable[str]) -> dict[str, float]:
    return {name: scenario.draws(f"{purpose}/{name}").random() for name in names}


def _churn(scenario: Scenario, spans: list[_Span]) -> Iterator[_Move]:
    """Faults as a Poisson process; each one's kind, victim and length have draws of their own."""
    churn, names = scenario.churn, scenario.names()
    last = scenario.duration_s - churn.calm_s
    touched = [_Span(span.peer, span.start, span.end + churn.back_s) for span in spans]
    for number, at_s in enumerate(_arrivals(scenario, last)):
        fault = f"churn/{number}"
        draws = scenario.draws(fault)
        kind = churn.kinds[int(draws.random() * len(churn.kinds))]
        until = _ms(min(at_s - churn.mean_down_s * math.log(1 - draws.random()), last))
        end = until + churn.back_s
        touched = [span for span in touched if span.end > at_s]  # the others are of the past
        free = _free(names, touched, at_s, end)
        if until <= at_s or not free or _least_untouched(names, touched, at_s, end) <= churn.least_up:
            continue
        ranking = _ranking(scenario, fault, names)
        peer = min(free, key=ranking.__getitem__)
        touched.append(_Span(peer, at_s, end))
        opposite = OPPOSITE[kind]
        other = {"other": ""} if kind == "cut" else {}
        undone = {"keep_disk": draws.random() >= churn.lose_disk} if opposite == "restart" else other
        yield _Move(_strike(at_s, kind, peer, **other), "", False)
        yield _Move(_strike(until, opposite, peer, **undone), "", True)


def _arrivals(scenario: Scenario, last: float) -> Iterator[float]:
    """When faults come, as far as `last`: gaps are exponential."""
    draws, rate, at_s = scenario.draws("churn"), scenario.churn.faults_per_hour / 3600, 0.0
    while rate > 0 and (at_s := at_s - math.log(1 - draws.random()) / rate) < last:
        yield _ms(at_s)


def _least_untouched(names: list[str], spans: list[_Span], start: float, end: float) -> int:
    """The fewest peers that nothing touches at one moment from `start` to `end`."""
    moments = {start} | {span.start for span in spans if start < span.start <= end}
    return min(len(_free(names, spans, moment, moment)) for moment in moments)
