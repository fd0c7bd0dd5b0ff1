"""One clear sentence for whatever is wrong with a scenario file: the file, the place, the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from scenario_files import GOOD, event, waiting, written

from p2pllm.errors import UsageError
from p2pllm_peers.lab.scenario import load_scenario

KILL = event("kill", peer='"home-0"')

WRONG = {
    # what cannot be read
    "toml": ("a = = 1", "is not valid TOML: "),
    "short": ("short = 3", "short is no section"),
    # unknown fields
    "top": ("durations = 1", r"durations is not a known field \(did you mean duration_s\?\)"),
    "link-field": ("[links.x]\nup_mbits = 1", r"\[links\.x\] .*up_mbit"),
    "peer-field": (GOOD + "[[peers]]\ncore = 1", r"\[\[peers\]\] 3 core is .*did you mean cores\?"),
    "event-field": (GOOD + event("kill", pear='"x"'), r"\[\[events\]\] 1 pear is .*did you mean peer\?"),
    "churn-field": ("[churn]\nfault_per_hour = 1", r"\[churn\] fault_per_hour .*did you mean faults_per_hour\?"),
    "verdict-field": ("[verdict]\nmin_round = 1", r"\[verdict\] min_round is .*did you mean min_rounds\?"),
    "run-field": ("[run.round]\nsampels = 1", r"\[run\] round\.sampels .*did you mean samples\?"),
    "short-field": ("[short.churn]\nfoo = 1", r"with \[short\]: \[churn\] foo is not a known field"),
    "short-short": ("[short.short]", r"with \[short\]: short is not a known field"),
    # sections that are none
    "links": ("links = 3", "links: must be"),
    "link": ("links.x = 3", r"\[links\.x\] must be a section of its own, but is 3"),
    "peers": ('peers = ["a"]', r"\[\[peers\]\] 1 must be a section"),
    "peers-table": ("[peers]\ncount = 3", "peers: must be"),
    "run": ("run = 3", "run: must be"),
    "file": ("[run]\nfile = 3", r"\[run\] file: is 3"),
    "no-run-file": ('[run]\nfile = "no.toml"', "There is no file .*no.toml"),
    # links
    "low-high": (GOOD.replace("[20, 60]", "[60, 20]"), r"\[links\.home\] delay_ms: is \[60, 20\].*lower end first"),
    "delay": (GOOD.replace("[20, 60]", "-1"), r"delay_ms: is -1, but must be from 0"),
    "delays": (GOOD.replace("[20, 60]", "[1, 2, 3]"), r"delay_ms: .*milliseconds, or \[low, high\]"),
    "delay-text": (GOOD.replace("[20, 60]", '"slow"'), r"delay_ms: is slow, but must be milliseconds"),
    "rate": (GOOD.replace("up_mbit = 20", "up_mbit = 0"), r"up_mbit: must be greater than 0\.1 \(it is '0'\)"),
    "loss": (GOOD.replace("delay_ms = [20, 60]", "loss = 0.9"), r"loss: must be less than or equal to 0\.5"),
    "unknown-link": (GOOD.replace('link = "home"', 'link = "hom"'), r"no \[links\.hom\] \(did you mean home\?\)"),
    "some-links": (GOOD + "[[peers]]", r"\[\[peers\]\] peer: has no link, but other peers have"),
    "unused-link": (GOOD + "[links.x]\nup_mbit = 1\ndown_mbit = 1", r"\[links\.x\]: no peer uses it"),
    # peers and the run
    "twice": (GOOD.replace('"late"', '"home-1"'), "2 peers have the name home-1"),
    "any": (GOOD.replace('"late"', '"any"'), "no peer can have the name any"),
    "leader": (GOOD.replace('"late"', '"leader"'), "no peer can have the name leader, which means a certain one"),
    "name": (GOOD.replace('"late"', '"Late"'), r"\[\[peers\]\] 2 name does not fit \(it is 'Late'\): 1 to 12 of a-z"),
    "setting": (GOOD + "[[peers]]\nsettings = {device = 1}", r"settings: device is none of cpu_percent, "),
    "too-many": (GOOD.replace("samples = 8", "max_peers = 2"), r"there are 3 peers, but max_peers .* is 2"),
    "too-few": (GOOD.replace("samples = 8", "min_peers = 3"), "2 of the peers are there at the start"),
    "none": ("peers = []", "0 of the peers are there at the start"),
    "late": (
        GOOD.replace("start_s = 20", "start_s = 100"),
        r"late: start_s is 100, but the end, duration_s, is at 100",
    ),
    "text": ('[run.data]\nsource = "text:no.txt"', r'\[run\.data\] source: there is no readable text at "/.*/no\.txt"'),
    "tokenizer": ('[run.tokenizer]\nsource = "file:no.json"', r'\[run\.tokenizer\] source: there is no file "/.*no.j'),
    # events: fields
    "do": (GOOD + event("kil", peer='"late"'), r"\[\[events\]\] 1 do: must be 'kill', "),
    "at": (GOOD + '[[events]]\ndo = "heal"', r"\[\[events\]\] 1 \(heal at 0 s\): at_s is missing; set it, or phase"),
    "no-peer": (GOOD + event("freeze"), r"\[\[events\]\] 1 \(freeze at 30 s\): needs peer"),
    "no-cores": (GOOD + event("slow_machine", peer='"late"'), "needs cores"),
    "no-file": (GOOD + event("corrupt", peer='"late"'), "needs file"),
    "no-groups": (GOOD + event("partition", groups="[]"), "needs groups"),
    "no-line": (GOOD + event("slow_link", peer='"late"', link="{}"), "needs link"),
    "cut-cores": (GOOD + event("cut", peer='"late"', cores=1), "does not take cores, only peer, other, for_s"),
    "heal-peer": (GOOD + event("heal", peer='"late"'), "does not take peer, only no other field"),
    "thaw-for": (GOOD + event("thaw", peer='"late"', for_s=3), "does not take for_s"),
    "blink": (GOOD + event("freeze", peer='"late"', for_s=0.01), "too short to notice; make it at least 0.1"),
    "keep-disk": (GOOD + event("kill", peer='"late"', keep_disk="false"), "keep_disk .*; add for_s"),
    # events: what they name
    "who": (GOOD + event("kill", peer='"home-9"'), r"no peer home-9 \(did you mean home-\d\?\); there are home-0, "),
    "other": (GOOD + event("cut", peer='"late"', other='"lat"'), r"no peer lat \(did you mean late\?\)"),
    "self": (GOOD + event("cut", peer='"late"', other='"late"'), "peer and other are the same"),
    "thaw-any": (GOOD + event("thaw", peer='"any"'), '"any" cannot be undone'),
    "end": (GOOD + event("kill", at_s=100, peer='"late"'), "the end, duration_s, is at 100; take an earlier time"),
    "disk": (GOOD + event("fill_disk", peer='"home-0"'), r"home-0 has no disk of its own; .* disk_mb"),
    "same-cores": (GOOD + event("slow_machine", peer='"home-0"', cores=0.5), "0.5, which home-0 has already"),
    "group-twice": (GOOD + event("partition", groups='[["late"], ["late"]]'), "groups name late 2 times"),
    "group-who": (GOOD + event("partition", groups='[["lat"]]'), "no peer lat"),
    "group-empty": (GOOD + event("partition", groups='[["late"], []]'), "one of the groups is empty"),
    "one-group": (GOOD + event("partition", groups='[["late", "home-0", "home-1"]]'), "all peers are in one group"),
    "loopback": ("[[peers]]\ncount = 2\n" + event("cut", peer='"peer-0"'), "no peer has a link that could change"),
    "line": (GOOD + event("slow_link", peer='"late"', link="{loss = 2}"), "link: loss: must be"),
    "line-field": (GOOD + event("slow_link", peer='"late"', link="{up = 2}"), "link: up is not a known field"),
    "line-range": (GOOD + event("slow_link", peer='"late"', link="{delay_ms = [1, 2]}"), "must be one number"),
    "line-nat": (GOOD + event("slow_link", peer='"late"', link="{nat = true}"), "nat cannot change"),
    # events: in a phase
    "phase": (GOOD + waiting("kill", phase='"votes"', peer='"late"'), r"\[\[events\]\] 1 phase: must be '', 'coll"),
    "at-phase": (GOOD + event("kill", phase='"vote"', peer='"late"'), "takes at_s or phase, not both"),
    "no-phase": (GOOD + event("kill", peer='"leader"'), r"1 \(kill at 30 s\): there is no peer leader"),
    "any-phase": (GOOD + waiting("kill", peer='"any"'), r"1 \(kill in vote\): there is no peer any"),
    "after": (GOOD + waiting("kill", peer='"late"', after_s=100), "the end, duration_s, is at 100"),
    "mixed": (GOOD + waiting("kill", peer='"late"') + KILL, "some wait for a phase, so all must"),
    "phase-churn": (GOOD + waiting("kill", peer='"late"') + "[churn]\nfaults_per_hour = 9", "there can be no .churn"),
    "no-end": (GOOD.replace("duration_s = 100", "") + waiting("kill", peer='"late"'), "may never come; set duration_s"),
    "thaw-phase": (GOOD + waiting("thaw", peer='"late"'), "thaw cannot wait for a phase; take one of corrupt, cut, fi"),
    "for-ever": (GOOD + waiting("freeze", peer='"leader"'), r"1 \(freeze in vote\): for_s is missing: the next event"),
    "path": (
        GOOD + waiting("cut", peer='"leader"', other='"home-0"', for_s=5),
        "the leader may be home-0 itself; name both peers, or cut the whole line",
    ),
    "one-peer": (
        GOOD.replace("count = 2", "count = 1") + waiting("kill", peer='"member"'),
        "of one peer there is no member; add another one",
    ),
    "some-disks": (
        GOOD + waiting("fill_disk", peer='"member"', for_s=5),
        "not every peer that it may meet has a disk of its own",
    ),
    # events: in time
    "thaw": (GOOD + event("thaw", peer='"home-0"'), r"1 \(thaw at 30 s\): home-0 is not frozen then"),
    "restart": (GOOD + event("restart", peer='"home-0"'), "home-0 is not down then"),
    "heal": (GOOD + event("heal"), "the network is not partitioned then"),
    "kill-twice": (
        GOOD + KILL + event("kill", at_s=40, peer='"home-0"'),
        r"2 \(kill at 40 s\): home-0 is down already",
    ),
    "freeze-dead": (GOOD + KILL + event("freeze", at_s=40, peer='"home-0"'), "home-0 is down then"),
    "thaw-dead": (
        GOOD + event("freeze", at_s=20, peer='"home-0"', for_s=30) + KILL,
        r"the end of \[\[events\]\] 1 \(freeze at 20 s for 30 s\): home-0 is not frozen then",
    ),
    "not-yet": (GOOD + event("kill", at_s=10, peer='"late"'), "late joins only at 20 s"),
    "nobody": (
        GOOD + "".join(event("kill", peer=f'"{name}"') for name in ("home-0", "home-1", "late", "any")),
        "there is no peer that nothing else touches meanwhile",
    ),
    # churn and limits
    "churn-end": ("[churn]\nfaults_per_hour = 9", r"\[churn\]: duration_s is 0, but the last 30 s, calm_s"),
    "churn-up": (GOOD + "[churn]\nfaults_per_hour = 9\nleast_up = 3", "least_up is 3 of 3 peers"),
    "churn-zero": (GOOD + "[churn]\nleast_up = 1", "faults_per_hour is missing"),
    "churn-kinds": (GOOD + '[churn]\nkinds = ["thaw"]', r"\[churn\] kinds\.0: must be 'kill'"),
    "churn-cut": ('duration_s = 90\npeers = [{count = 2}]\n[churn]\nfaults_per_hour = 9\nkinds = ["cut"]', "add a "),
    "rounds": (GOOD + "[verdict]\nmin_rounds = 401", r"\[verdict\] min_rounds: 401 cannot be reached.* 400 rounds"),
    "alone": ("[verdict]\nmin_efficiency = 0.5", r"min_efficiency: .*set alone_s"),
    "recovery": (GOOD + "[verdict]\nmax_recovery_s = 5", "there is no fault to recover from"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_refused_in_one_sentence(tmp_path: Path, case: str) -> None:
    text, words = WRONG[case]
    path = written(tmp_path, text)
    with pytest.raises(UsageError, match=words) as caught:
        load_scenario(path)
    sentence = str(caught.value)
    assert path in sentence and "\n" not in sentence and sentence.endswith(".") and not sentence.endswith("..")
    assert len(sentence.replace(str(tmp_path), "")) < 320


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hom-lines", r'There is no scenario "hom-lines" \(did you mean home-lines\?\); name one of churn, '),
        ("no/such", "There is no file no/such; correct the path"),
        ("such.toml", "There is no file such.toml"),
    ],
)
def test_a_scenario_that_is_not_there(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_scenario(name)


def test_files_that_hold_no_text(tmp_path: Path) -> None:
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="holds no UTF-8 text"):
        load_scenario(str(tmp_path / "bytes.toml"))
    with pytest.raises(UsageError, match=r"There is no file .*"):
        load_scenario(str(tmp_path) + "/")


def test_no_short_form(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"mine\.toml has no short form; add a section \[short\]"):
        load_scenario(written(tmp_path, GOOD), short=True)
