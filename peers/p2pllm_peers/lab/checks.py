"""What must fit together in a scenario for it to be one: names, links, peers and the run, events, limits.

Pure but for a look at the files that the run names. What does not live here: bounds of single fields (`scenario`),
and events that contradict each other in time (`timeline`).
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from p2pllm.errors import DataError, UsageError
from p2pllm.explain import explain
from p2pllm.training.sources import documents
from p2pllm_peers.lab.scenario import ANYONE, LEADER, MEMBER, OPPOSITE, Event, Link, Scenario
from p2pllm_peers.lab.timeline import timeline


class Fields(NamedTuple):
    """What one kind of event is, the fields that it needs, and those that it also takes."""

    what: str
    needs: tuple[str, ...] = ("peer",)
    takes: tuple[str, ...] = ()

    def sentence(self) -> str:
        """All of it in words."""
        also = f", takes {', '.join(self.takes)}" if self.takes else ""
        return f"{self.what}; needs {', '.join(self.needs) or 'nothing'}{also}"


FIELDS = {
    "kill": Fields("all its processes end at once, as with kill -9", takes=("for_s", "keep_disk")),
    "freeze": Fields("all its processes stand still", takes=("for_s",)),
    "thaw": Fields("they go on"),
    "stop": Fields("it leaves in order, as with Ctrl+C", takes=("for_s", "keep_disk")),
    "restart": Fields("it comes back after a kill or stop", takes=("keep_disk",)),
    "cut": Fields("its line, or its path to one other, carries nothing", takes=("other", "for_s")),
    "mend": Fields("the line or path carries again", takes=("other",)),
    "partition": Fields("only peers of one group reach each other", ("groups",), ("for_s",)),
    "heal": Fields("all reach each other again", ()),
    "slow_link": Fields("its line changes", ("peer", "link"), ("for_s",)),
    "restore_link": Fields("its line is as it began"),
    "slow_machine": Fields("its share of a core changes", ("peer", "cores"), ("for_s",)),
    "fill_disk": Fields("its disk, which needs disk_mb, is full", takes=("for_s",)),
    "free_disk": Fields("its disk has the room back"),
    "corrupt": Fields("one bit of one of its files flips", ("peer", "file")),
    "pause": Fields("its user wants a rest, as with `p2pllm pause`", takes=("for_s",)),
    "resume": Fields("it may compute again"),
}
"""Each action and its fields, beside `do` and the time or phase."""

SHORTEST_S = 0.1
"""What an event with an end lasts at least."""

IN_A_PHASE = frozenset({"kill", "freeze", "stop", "cut", "slow_link", "slow_machine", "fill_disk", "corrupt", "pause"})
"""Actions that can wait for a phase."""

_ENDLESS = frozenset({"kill", "stop", "corrupt"})
"""Those of them without an end, after which the swarm can be whole again."""

_ON_THE_NETWORK = frozenset({"cut", "mend", "partition", "heal", "slow_link", "restore_link"})


def check(scenario: Scenario) -> None:
    """Raise UsageError with a phrase that says where, what is wrong, and what would be right."""
    _check_peers(scenario)
    _check_links(scenario)
    _check_run(scenario)
    for number, event in enumerate(scenario.events, 1):
        try:
            _check_fields(event)
            _check_event(scenario, event)
        except UsageError as error:
            when = f"in {event.phase}" if event.phase else f"at {event.at_s:g} s"
            raise UsageError(f"[[events]] {number} ({event.do} {when}): {error}") from None
    _check_phases(scenario)
    _check_churn(scenario)
    _check_verdict(scenario)
    timeline(scenario)


def like(name: str, known: Iterable[str]) -> str:
    """A hint at the known name that was probably meant; "" if there is none."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _check_peers(scenario: Scenario) -> None:
    names = scenario.names()
    for name, times in Counter(names).items():
        if times > 1:
            raise UsageError(f"[[peers]]: {times} peers have the name {name}; give each [[peers]] another name")
        if name in (ANYONE, LEADER, MEMBER):
            raise UsageError(f"[[peers]]: no peer can have the name {name}, which means a certain one in events")
    limits = scenario.run.round
    if len(names) > limits.max_peers:
        raise UsageError(
            f"[[peers]]: there are {len(names)} peers, but max_peers of [run.round] is {limits.max_peers}; "
            f"take fewer, or raise it to at most 64"
        )
    first = sum(peers.count for peers in scenario.peers if not peers.start_s)
    if first < limits.min_peers:
        raise UsageError(
            f"[[peers]]: {first} of the peers are there at the start (start_s = 0), but the run needs "
            f"{limits.min_peers}, min_peers of [run.round]; give more of them start_s = 0"
        )
    for peers in scenario.peers:
        if scenario.duration_s and peers.start_s >= scenario.duration_s:
            raise UsageError(
                f"[[peers]] {peers.name}: start_s is {peers.start_s:g}, but the end, duration_s, is at "
                f"{scenario.duration_s:g}; take an earlier time"
            )


def _check_links(scenario: Scenario) -> None:
    used = {peers.link for peers in scenario.peers if peers.link}
    for peers in scenario.peers:
        if peers.link and peers.link not in scenario.links:
            hint = like(peers.link, scenario.links)
            raise UsageError(f"[[peers]] {peers.name}: there is no [links.{peers.link}]{hint}; describe it")
        if used and not peers.link:
            raise UsageError(f"[[peers]] {peers.name}: has no link, but other peers have; give a link to all or none")
    for name in scenario.links:
        if name not in used:
            raise UsageError(f'[links.{name}]: no peer uses it; write link = "{name}" in a [[peers]], or remove it')


def _check_run(scenario: Scenario) -> None:
    data, tokenizer = scenario.run.data.source, scenario.run.tokenizer.source
    if data.startswith("text:"):
        try:
            documents(data)
        except DataError:
            where = data.removeprefix("text:")
            raise UsageError(f'[run.data] source: there is no readable text at "{where}"; correct the path') from None
    if tokenizer.startswith("file:") and not Path(where := tokenizer.removeprefix("file:")).is_file():
        raise UsageError(f'[run.tokenizer] source: there is no file "{where}"; correct the path')


def _check_fields(event: Event) -> None:
    """It has what it needs, and nothing that it does not take."""
    fields, given = FIELDS[event.do], event.model_fields_set - {"do", "phase", "at_s", "after_s"}
    if event.phase and "at_s" in event.model_fields_set:
        raise UsageError("takes at_s or phase, not both; with phase, after_s says from when on")
    if not event.phase and "at_s" not in event.model_fields_set:
        raise UsageError("at_s is missing; set it, or phase")
    for name in fields.needs:
        if name not in given or getattr(event, name) in ("", (), {}):
            raise UsageError(f"needs {name}: {Event.model_fields[name].description}")
    for name in sorted(given):
        if name not in fields.needs + fields.takes:
            rest = ", ".join(fields.needs + fields.takes) or "no other field"
            raise UsageError(f"does not take {name}, only {rest}; remove it")
    if 0 < event.for_s < SHORTEST_S:
        raise UsageError(f"for_s is {event.for_s:g}, which is too short to notice; make it at least {SHORTEST_S:g}")
    if "keep_disk" in given and event.do != "restart" and not event.for_s:
        raise UsageError("keep_disk says how it comes back, but it does not; add for_s")


def _check_event(scenario: Scenario, event: Event) -> None:
    names = scenario.names()
    for name in [event.peer, event.other, *(name for group in event.groups for name in group)]:
        known = [*names, LEADER, MEMBER] if event.phase else [*names, ANYONE]
        if name and name not in (known if name == event.peer else names):
            raise UsageError(f"there is no peer {name}{like(name, names)}; there are {_some(names)}")
    if event.peer == ANYONE and event.do in set(OPPOSITE.values()) - {"slow_machine"}:
        raise UsageError('"any" cannot be undone by an event of its own; give the first one for_s, or name the peer')
    if scenario.duration_s and max(event.at_s, event.after_s) >= scenario.duration_s:
        raise UsageError(f"the end, duration_s, is at {scenario.duration_s:g}; take an earlier time")
    if event.do in _ON_THE_NETWORK and not scenario.links:
        raise UsageError("no peer has a link that could change; add a [links.NAME] and give it to all [[peers]]")
    if event.peer and event.peer == event.other:
        raise UsageError("peer and other are the same; take two")
    specs = [spec for spec in scenario.peer_specs() if event.peer in (spec.name, ANYONE, LEADER, MEMBER)]
    enough = all if event.peer in (LEADER, MEMBER) else any
    if event.do == "fill_disk" and not enough(spec.disk_mb for spec in specs):
        who = f"{event.peer} has no disk" if event.peer in names else "not every peer that it may meet has a disk"
        who = "no peer has a disk" if event.peer == ANYONE else who
        raise UsageError(f"{who} of its own; give its [[peers]] disk_mb")
    if event.do == "slow_machine" and (same := [spec.name for spec in specs if spec.cores == event.cores]):
        raise UsageError(f"cores is {event.cores:g}, which {same[0]} has already; take another share")
    if event.do == "partition":
        _check_groups(event, names)
    if event.do == "slow_link":
        _check_line(scenario, event)


def _check_phases(scenario: Scenario) -> None:
    """Nobody knows when they strike, so nothing else may: it could meet them in any order."""
    waiting = [(number, event) for number, event in enumerate(scenario.events, 1) if event.phase]
    if not waiting:
        return
    if len(waiting) < len(scenario.events) or scenario.churn.faults_per_hour:
        raise UsageError("[[events]]: some wait for a phase, so all must, and there can be no [churn]; take two files")
    if not scenario.duration_s:
        raise UsageError("[[events]]: some wait for a phase, which may never come; set duration_s")
    for number, event in waiting:
        problem = ""
        if event.do not in IN_A_PHASE:
            problem = f"{event.do} cannot wait for a phase; take one of {', '.join(sorted(IN_A_PHASE))}"
        elif not event.for_s and event.do not in _ENDLESS:
            problem = "for_s is missing: the next event waits until this one is undone; set it"
        elif event.other and event.peer in (LEADER, MEMBER):
            problem = f"the {event.peer} may be {event.other} itself; name both peers, or cut the whole line"
        elif event.peer in (LEADER, MEMBER) and sum(not spec.start_s for spec in scenario.peer_specs()) < 2:
            problem = f"of one peer there is no {event.peer}; add another one, or name it"
        if problem:
            raise UsageError(f"[[events]] {number} ({event.do} in {event.phase}): {problem}")


def _check_groups(event: Event, names: list[str]) -> None:
    members = [name for group in event.groups for name in group]
    for name, times in Counter(members).items():
        if times > 1:
            raise UsageError(f"groups name {name} {times} times; name each peer once at most")
    if not all(event.groups):
        raise UsageError("one of the groups is empty; remove it")
    if len(event.groups) == 1 and len(members) == len(names):
        raise UsageError("all peers are in one group; leave some out, or make more groups")


def _check_line(scenario: Scenario, event: Event) -> None:
    for spec in scenario.peer_specs():
        if spec.link is not None and event.peer in (spec.name, ANYONE, LEADER, MEMBER):
            try:
                changed = Link.model_validate(spec.link.model_dump() | event.link)
            except ValidationError as error:
                raise UsageError(f"link: {explain(error, Link)}") from None
            if isinstance(changed.delay_ms, tuple):
                raise UsageError("link: delay_ms must be one number here")
            if changed.nat != spec.link.nat:
                raise UsageError("link: nat cannot change while it runs; remove it")


def _check_churn(scenario: Scenario) -> None:
    churn, peers = scenario.churn, len(scenario.names())
    if not churn.faults_per_hour:
        if churn.model_fields_set and "faults_per_hour" not in churn.model_fields_set:
            raise UsageError("[churn]: faults_per_hour is missing, so nothing would happen; set it, for example to 60")
        return
    if churn.calm_s >= scenario.duration_s:
        raise UsageError(
            f"[churn]: duration_s is {scenario.duration_s:g}, but the last {churn.calm_s:g} s, calm_s, are without "
            f"faults; make duration_s longer than that"
        )
    if churn.least_up >= peers:
        raise UsageError(f"[churn]: least_up is {churn.least_up} of {peers} peers, so nothing may happen; lower it")
    if "cut" in churn.kinds and not scenario.links:
        raise UsageError('[churn]: kinds has "cut", but no peer has a link; add a [links.NAME], or remove it')


def _check_verdict(scenario: Scenario) -> None:
    verdict, rounds = scenario.verdict, scenario.run.round.rounds
    if verdict.min_rounds is not None and verdict.min_rounds > rounds:
        raise UsageError(
            f"[verdict] min_rounds: {verdict.min_rounds} cannot be reached, since the run has {rounds} rounds; "
            f"lower it, or raise rounds of [run.round]"
        )
    if verdict.min_efficiency is not None and not scenario.alone_s:
        raise UsageError("[verdict] min_efficiency: needs what peers make alone; set alone_s, for example to 20")
    if scenario.events or scenario.churn.faults_per_hour:
        return
    for name in ("max_recovery_s", "survivors_within_s", "stalls_within_s", "returns_within_s"):
        if getattr(verdict, name):
            raise UsageError(f"[verdict] {name}: there is no fault to recover from; remove it, or add [[events]]")


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
