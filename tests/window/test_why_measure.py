"""The study why a window ends, from end to end on a reader that looks where it is told to."""

import json

import numpy as np
import pytest

from laid_eval import ScriptedReader, UserError, load_run, measure_window
from laid_eval.records import WhyTrial
from laid_eval.runs import load_why_trials, save_header
from laid_eval.window.haystack import Haystack, load_corpus
from laid_eval.window.probes import load_probe
from laid_eval.window.why import CONDITIONS, Study
from laid_eval.window.why_measure import WhyOptions, answered, check_options, explain_run, measure_why, study_of
from laid_eval.window.why_texts import compressed_positions, texts

OPTIONS = WhyOptions(length=4096, haystacks=3, questions=8)


class Words:
    """One number a word. Finds the words of a needle in what it sees, up to a distance in positions it can reach."""

    def __init__(self, reach=float("inf"), most=float("inf"), stop=None):
        self.reach, self.most, self.stop = reach, most, stop
        self.words, self.numbers = {}, {}
        self.begin()
        self.posed = []

    def encode(self, text):
        return [self.words.setdefault(word, len(self.words)) for word in text.split()]

    def opening(self, instruction):
        return self.encode(instruction)

    def question_tokens(self, question):
        return len(question.prompt.split()) + len(question.lead.split()) + 1

    def begin(self):
        self.tokens, self.positions = [], []

    def read(self, tokens):
        self.positions += range(len(self.tokens), len(self.tokens) + len(tokens))
        self.tokens += tokens

    def move(self, shifts):
        self.positions = [p + by for p, by in zip(self.positions, shifts, strict=True)]

    def pose(self, posed):
        if self.stop is not None:
            self.stop -= 1
            if self.stop < 0:
                raise KeyboardInterrupt
        self.posed += posed
        return [self._answer(p) for p in posed]

    def _answer(self, p):
        """The right choice where its statement is seen whole and near enough, among few enough tokens; else another."""
        question = p.asked.question
        at = len(self.tokens) if p.at is None else p.at
        hidden = {i for a, b in p.hidden for i in range(a, b)}
        lead, answer = self.encode(question.lead), question.choices[question.answer]
        found = answer in p.told and question.lead in p.told
        for i in range(len(self.tokens) - len(lead)):
            if self.tokens[i : i + len(lead)] == lead and not hidden & set(range(i, i + len(lead) + 1)):
                said = self.tokens[i + len(lead)] == self.words.get(f"{answer}.", -1)
                found |= said and at - self.positions[i] <= self.reach
        right = found and (bool(p.told) or len(self.tokens) <= self.most)
        return [0.0 if (k == question.answer) == right else -1.0 for k in range(len(question.choices))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished window run of a reader with a window of about 2,000 tokens."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return measure_window(ScriptedReader(location=11), out=folder, max_length=4096, min_length=512)


@pytest.fixture
def folder(finished, tmp_path):
    save_header(tmp_path / "run", finished.header)
    return tmp_path / "run"


def study(run=None, options=OPTIONS, probe="needle"):
    return Study(probe, options.length, 512, options.haystacks, options.questions)


def split(folder, reader, probe="needle", options=OPTIONS):
    run = load_run(folder)
    return measure_why(
        reader, load_probe(probe), load_corpus(), run.header.settings, study(run, options, probe), folder
    )


def shares(why):
    return {name: why.part(name).value for name in ("loss", "position", "dilution", "distractors", "recovered")}


def test_a_reader_that_sees_only_near_positions_loses_by_position_alone(folder):
    found = shares(split(folder, Words(reach=520)))
    assert found["loss"] > 0.5
    assert found["position"] == pytest.approx(found["loss"])
    assert found["recovered"] == pytest.approx(found["loss"])
    assert found["dilution"] == found["distractors"] == 0


def test_a_reader_that_drowns_in_tokens_loses_by_dilution_alone(folder):
    found = shares(split(folder, Words(most=1000)))
    assert found["loss"] == found["dilution"] == found["recovered"] > 1
    assert found["position"] == found["distractors"] == 0


@pytest.mark.parametrize("probe", ["needle", "multikey", "association"])
def test_all_six_ways_ask_the_same_questions_about_facts_told_once(folder, probe):
    reader = Words()
    split(folder, reader, probe)
    by_way = {name: [p for p in reader.posed if f"/{name}/" in p.asked.id] for name in CONDITIONS}
    assert len(reader.posed) == 6 * OPTIONS.haystacks * OPTIONS.questions
    for ways in by_way.values():
        assert [p.asked.question for p in ways] == [p.asked.question for p in by_way["short"]]
    depths = {name: np.array([p.asked.depth for p in ways]) for name, ways in by_way.items()}
    assert np.abs(depths["short"] - depths["full"]).mean() < 0.1, "at the same depths in both texts"
    assert depths["full"].min() < 0.2
    assert depths["full"].max() > 0.8


def test_multihop_moves_its_whole_chain(folder):
    options = WhyOptions(length=8192, haystacks=2, questions=8)
    run = load_run(folder)
    reader, probe = Words(), load_probe("multihop")
    measure_why(
        reader, probe, load_corpus(), run.header.settings, Study("multihop", 8192, 1024, 2, options.questions), folder
    )
    near = [p for p in reader.posed if p.told]
    assert near
    assert all(p.told.count("The variable") == probe.hops + 1 == len(p.hidden) for p in near)


def test_distances_are_those_of_the_other_text_by_position_ids_alone(folder):
    split(folder, Words())
    trials = {(t.condition, t.haystack, t.question): t for t in load_why_trials(folder)}
    for (condition, haystack, question), trial in trials.items():
        full, short = (trials[name, haystack, question].distance for name in ("full", "short"))
        if condition == "far":
            assert trial.distance == max(full, short)
        if condition == "crowded":
            assert abs(trial.distance - short) < 100, "about as near as in the short text"
            assert trial.distance <= 512
        if condition == "alone":
            assert trial.distance == full
        if condition == "near":
            assert trial.distance < 40


def test_compressed_positions_keep_statements_whole_and_end_where_asked():
    text = Haystack(list(range(100)), ((10, 15), None, (60, 70)))
    found = np.array(compressed_positions(text, 7, 40))
    steps = np.diff(found)
    assert found[0] == 0
    assert found[-1] == pytest.approx(39)
    kept = {*range(7), *range(17, 22), *range(67, 77)}
    assert all(steps[i - 1] == pytest.approx(1.0 if i in kept else (40 - 22) / 85) for i in range(1, 107))


def test_what_is_hidden_is_the_statements_meant(folder):
    reader, run = Words(), load_run(folder)
    probe = load_probe("needle")
    for text in texts(reader, probe, load_corpus(), run.header.settings.seed, study(), 0):
        named = {number: word for word, number in reader.words.items()}
        for way in text.ways:
            p = way.posed
            said = [" ".join(named[t] for t in text.tokens[a:b]) for a, b in p.hidden]
            lead = p.asked.question.lead
            if way.condition == "near":
                assert [s.strip() for s in said] == [p.told.strip()]
                assert lead in p.told
            if way.condition == "alone":
                assert len(said) > 8
                assert not any(lead in s for s in said)


def same(why):
    return why.model_copy(update={"seconds": None})


@pytest.mark.parametrize("kept", [1, 3, 6, 8])
def test_a_killed_study_goes_on_and_ends_with_the_same_split(folder, tmp_path, finished, kept):
    save_header(tmp_path / "whole", finished.header)
    whole = split(tmp_path / "whole", Words(reach=520))
    with pytest.raises(KeyboardInterrupt):
        split(folder, Words(reach=520, stop=kept))
    assert len(load_why_trials(folder)) < len(load_why_trials(tmp_path / "whole"))
    with (folder / "why.jsonl").open("a") as file:
        file.write('{"torn')
    run = explain_run(Words(reach=520), [load_probe("needle")], load_corpus(), folder, OPTIONS)
    assert same(run.why[0]) == same(whole)
    assert (run.why[0].seconds is None) == (kept > 1), "known where all was asked in one session"
    assert (folder / "why.jsonl").read_text() == (tmp_path / "whole" / "why.jsonl").read_text()
    assert load_run(folder).header.why == run.why


def test_a_study_that_is_there_is_not_asked_again(folder):
    probes = [load_probe("needle")]
    run = explain_run(Words(), probes, load_corpus(), folder, OPTIONS)
    assert answered(run, probes, OPTIONS)
    assert not answered(run, probes, WhyOptions(length=4096, haystacks=4, questions=8))
    again = Words()
    explain_run(again, probes, load_corpus(), folder, WhyOptions(length=4096, haystacks=2, questions=8))
    assert not again.posed, "fewer haystacks of the same study come from disk"


def test_the_default_length_is_where_the_window_has_failed(finished):
    probe = load_probe("needle")
    found = study_of(finished.header, probe, WhyOptions())
    assert found.length == round(finished.window(criterion="half").length)
    assert found.short_length == 512
    assert study_of(finished.header, probe, WhyOptions(length=3000)).length == 3000
    wide = finished.window(criterion="half").model_copy(update={"censored": "above", "length": None})
    run = finished.header.model_copy(update={"windows": (wide,)})
    assert study_of(run, probe, WhyOptions()).length == 4096
    none = finished.window(criterion="half").model_copy(update={"censored": "below", "length": None})
    with pytest.raises(
        UserError, match=r"\(<512 tokens under `half`\) is less than twice its shortest text \(512 tokens\)"
    ):
        study_of(finished.header.model_copy(update={"windows": (none,)}), probe, WhyOptions())


def test_a_probe_without_a_needle_is_told_so_and_does_not_stop_the_others(folder):
    with pytest.raises(UserError, match=r"the answer of 'aggregate' is spread over the whole text and has no place"):
        check_options(OPTIONS, [load_probe("aggregate")])
    run = explain_run(Words(), [load_probe("aggregate"), load_probe("needle")], load_corpus(), folder, OPTIONS)
    assert [why.probe for why in run.why] == ["needle"]
    note = "not said why: the answer of probe 'aggregate' is spread over the whole text and has no place"
    assert run.notes.count(note) == 1
    again = explain_run(Words(), [load_probe("aggregate"), load_probe("needle")], load_corpus(), folder, OPTIONS)
    assert again.notes == run.notes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (WhyOptions(haystacks=1), "--why-haystacks must be at least 2, got 1"),
        (WhyOptions(questions=0), "--why-questions must be at least 1, got 0"),
        (WhyOptions(length=600), r"--why-length 600 is too short: .* 512 tokens .* probe 'multikey', 1024\."),
    ],
)
def test_numbers_that_are_too_small_are_refused_first(options, message):
    with pytest.raises(UserError, match=message):
        check_options(options, [load_probe("needle"), load_probe("multikey")])


def test_a_short_text_without_room_for_enough_facts_is_told(folder):
    run = load_run(folder).header
    with pytest.raises(UserError, match=r"has room for \d facts of probe 'multikey', needed are 8\. Pass --min-length"):
        measure_why(
            Words(), load_probe("multikey"), load_corpus(), run.settings, Study("multikey", 4096, 80, 2, 8), folder
        )


def test_a_scripted_reader_has_no_positions(tmp_path):
    with pytest.raises(UserError, match="a scripted reader has no positions"):
        measure_window(ScriptedReader(), out=tmp_path / "run", max_length=4096, why=True)


def test_a_run_of_before_loads_and_a_line_is_a_trial(finished, folder):
    document = json.loads(finished.header.model_dump_json())
    del document["why"]
    (folder / "run.json").write_text(json.dumps(document))
    assert load_run(folder).header.why is None
    split(folder, Words())
    first = json.loads((folder / "why.jsonl").read_text().splitlines()[0])
    assert set(first) == set(WhyTrial.model_fields)
