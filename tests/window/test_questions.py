"""What is asked: balanced choices, exact places, even depths."""

from itertools import pairwise
from zlib import crc32

import numpy as np
import pytest
from scipy.stats import binomtest, chisquare

from laid_eval.errors import UserError
from laid_eval.resources import content_hash
from laid_eval.window.haystack import Corpus, build, check_long_enough, load_corpus, pick_by_depth
from laid_eval.window.plan import STRATA, coarse_cuts, length_grid
from laid_eval.window.probes import load_probe, load_probes, text_probe_names
from laid_eval.window.questions import draw_story

PROBES = ["needle", "multikey", "multihop", "aggregate", "association"]


def words(text):
    return text.split()


def asked(probe, seeds, share=1.0):
    for seed in range(seeds):
        rng = np.random.default_rng([seed, 9])
        story = draw_story(probe, rng)
        yield story, story.questions(range(int(len(story.statements) * share)), rng)


def test_the_five_text_probes_are_there():
    assert text_probe_names() == sorted(PROBES)
    assert [p.name for p in load_probes(["all"])] == sorted(PROBES)


@pytest.mark.parametrize("name", PROBES)
def test_a_reader_that_ignores_the_context_scores_at_chance(name):
    """Whatever it prefers: a place among the choices, a word, the shortest or the alphabetically first choice."""
    probe = load_probe(name)
    habits = {
        "first place": lambda q: 0,
        "last place": lambda q: len(q.choices) - 1,
        "first in the alphabet": lambda q: q.choices.index(min(q.choices)),
        "shortest": lambda q: q.choices.index(min(q.choices, key=len)),
        "a hash": lambda q: max(range(len(q.choices)), key=lambda i: crc32(q.choices[i].encode())),
    }
    right = dict.fromkeys(habits, 0)
    total = 0
    for _, questions in asked(probe, 200):
        for q in questions:
            total += 1
            for habit, choose in habits.items():
                right[habit] += choose(q) == q.answer
    for habit, count in right.items():
        assert binomtest(count, total, 1 / probe.choices).pvalue > 1e-4, habit


@pytest.mark.parametrize("name", ["multikey", "multihop", "association"])
def test_every_choice_was_stated(name):
    """Where answers are of one kind, picking whatever the text mentions must not help."""
    for story, questions in asked(load_probe(name), 20, share=0.8):
        text = " ".join(s.text for s in story.statements)
        assert questions
        assert all(choice in text for q in questions for choice in q.choices)


@pytest.mark.parametrize("name", PROBES)
def test_questions_are_well_formed(name):
    probe = load_probe(name)
    for story, questions in asked(probe, 20):
        assert len(questions) >= 6
        for q in questions:
            assert len(set(q.choices)) == probe.choices
            assert q.chance == 1 / probe.choices
            if q.needle is not None and name != "multihop":
                assert q.choices[q.answer] in story.statements[q.needle].text


def test_association_shares_no_content_word_between_fact_and_question():
    empty = {"there", "was", "who", "the", "a", "an", "is", "to", "has", "in", "of", "for", "and", "from", "with", "as",
             "likes", "very", "been", "back", "works", "on", "or",
             "at", "had", "near", "into", "its", "can't"}  # fmt: skip

    def content(text):
        plain = "".join(c if c.isalpha() or c == "'" else " " for c in text.lower())
        return {w.rstrip("s") for w in plain.split()} - {w.rstrip("s") for w in empty}

    for kind in load_probe("association").kinds:
        assert not content(kind.fact.replace("{answer}", "")) & content(kind.question), kind.fact


def test_aggregate_asks_for_the_commonest_word_so_far():
    probe = load_probe("aggregate")
    for share in (0.5, 0.7, 1.0):
        for story, questions in asked(probe, 10, share):
            read = story.statements[: int(len(story.statements) * share)]
            for q in questions:
                theme = probe.themes[int(q.item.removeprefix("theme"))]
                said = [w for w in theme.words for s in read if s.text == theme.fact.format(answer=w)]
                counts = sorted((said.count(c) for c in q.choices), reverse=True)
                assert said.count(q.choices[q.answer]) == counts[0] >= counts[1] + 2


def test_multihop_follows_the_chain_to_its_value():
    import re

    for story, questions in asked(load_probe("multihop"), 10):
        held = {}
        for s in story.statements:
            name, value = re.search(r"variable (\w+) is set to (?:the value of )?(\w+)\.", s.text).groups()
            held[name] = held.get(value, value)
        for q in questions:
            assert held[re.search(r"variable (\w+)\?", q.prompt).group(1)] == q.choices[q.answer]


@pytest.mark.parametrize("name", PROBES)
def test_statements_lie_where_their_spans_say_and_first_ones_before_the_first_cut(name):
    probe, corpus = load_probe(name), load_corpus()
    story = draw_story(probe, np.random.default_rng(1))
    # Words as tokens, one number per word, so that text can be read back.
    vocabulary = {}
    back = []

    def encode(text):
        out = []
        for word in text.split():
            if word not in vocabulary:
                vocabulary[word] = len(back)
                back.append(word)
            out.append(vocabulary[word])
        return out

    cuts = [probe.min_length, 2 * probe.min_length, 4096, 8192]
    text = build(corpus, story.statements, cuts, encode, np.random.default_rng(2))
    assert len(text.tokens) == cuts[-1]
    for statement, span in zip(story.statements, text.spans, strict=True):
        if span and span[1] <= cuts[-1]:
            assert " ".join(back[t] for t in text.tokens[slice(*span)]) == statement.text
        if statement.first:
            assert span is not None
            assert span[1] <= cuts[0]
    assert story.questions(text.read(cuts[0]), np.random.default_rng(3)), "something can be asked at the first cut"
    by_group = {}
    for statement, span in zip(story.statements, text.spans, strict=True):
        if span:
            by_group.setdefault(statement.group, []).append(span[0])
    assert all(starts == sorted(starts) for starts in by_group.values()), "a chain keeps its order"


def test_every_length_and_depth_is_covered_evenly():
    """Over many haystacks each quarter of depth holds its share of questions, at every cut point."""
    probe, corpus = load_probe("needle"), Corpus("filler", "", (("word " * 12,),), shuffled=True)
    grid = length_grid(256, 12288)
    refined = [256, 2896, 4096, 5793, 8192]
    for cuts in (refined, coarse_cuts(grid, 0), coarse_cuts(grid, 1)):
        counts = _depth_counts(probe, corpus, cuts)
        assert counts.sum(axis=1).min() > 300
        shares = counts / counts.sum(axis=1, keepdims=True)
        assert np.abs(shares - 0.25).max() < 0.07, shares.round(2)


def _depth_counts(probe, corpus, cuts):
    """Questions asked in each quarter of depth, over many haystacks; the shortest cut is left out."""
    counts = np.zeros((len(cuts), 4))
    for seed in range(150):
        rng = np.random.default_rng([seed, 1])
        story = draw_story(probe, rng)
        text = build(corpus, story.statements, cuts, words, rng)
        for k, cut in enumerate(cuts):
            depths = [sum(text.spans[i]) / 2 / cut for i in text.read(cut)]
            for i in pick_by_depth(depths, STRATA, rng):
                counts[k, min(int(depths[i] * 4), 3)] += 1
    return counts[1:]


def test_pick_by_depth_takes_one_of_each_of_as_many_slices_as_can_be_filled():
    rng = np.random.default_rng(0)
    picks = [pick_by_depth([0.1, 0.12, 0.6, 0.99], 12, rng) for _ in range(400)]
    assert all(len(p) == 3 and p[1:] == [2, 3] for p in picks), "thirds can be filled, quarters can't"
    assert chisquare(np.bincount([p[0] for p in picks], minlength=2)).pvalue > 1e-3
    assert pick_by_depth([], 12, rng) == []
    assert len(pick_by_depth([0.1, 0.2], 12, rng)) == 1


def test_the_same_seed_gives_the_same_haystack_and_another_seed_another():
    corpus, probe = load_corpus(), load_probe("needle")

    def make(seed):
        rng = np.random.default_rng(seed)
        story = draw_story(probe, rng)
        return build(corpus, story.statements, [256, 1024], words, rng).tokens

    assert make(1) == make(1)
    assert make(1) != make(2)


def test_a_text_of_the_users_keeps_its_order_and_must_be_long_enough(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text(" ".join(f"Sentence number {i} ends here." for i in range(200)))
    corpus = load_corpus([file])
    text = build(corpus, [], [900, 990], words, np.random.default_rng(0))
    numbers = [int(w) for w in text.tokens if w.isdigit()]
    assert all(b == (a + 1) % 200 for a, b in pairwise(numbers))
    assert check_long_enough(corpus, words, 1000) is None
    with pytest.raises(
        UserError, match=r"'book.txt' is too short: it has 1,000 tokens, contexts of 1,001 were asked for"
    ):
        check_long_enough(corpus, words, 1001)
    assert "repeats" in check_long_enough(load_corpus(), words, 10**7)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "can't be read: No such file"), (b"\xff\xfe\x00", "is not UTF-8 text"), (b"  \n ", "holds no text")],
)
def test_haystack_files_that_cannot_be_used(tmp_path, content, message):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_corpus([file])


GOOD = """
name = "mine"
task = "facts"
summary = "s"
instruction = "i"
choices = 2
first = 1
[[kinds]]
fact = "It is {answer}."
question = "What?"
lead = "It is"
answers = ["a", "b"]
[[kinds]]
fact = "He has {answer}."
question = "What has he?"
lead = "He has"
answers = ["c", "d"]
"""


def test_a_probe_of_the_users_is_accepted_by_path(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(GOOD)
    probe = load_probe(str(file))
    assert (probe.name, probe.choices, probe.min_length) == ("mine", 2, 256)
    file.write_text("# a comment\n" + GOOD + "\n")
    assert content_hash(load_probe(str(file))) == content_hash(probe)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("summary", "sumary"), r"unknown field 'sumary' \(did you mean 'summary'\?\)"),
        (('lead = "It is"', 'lead = "It is"\nleed = 1'), r"unknown field 'kinds\.0\.leed' \(did you mean 'lead'\?\)\. Allowed: fact, question, lead, answers"),
        (('task = "facts"', 'task = "fact"'), r"unknown task 'fact' \(did you mean 'facts'\?\)\. Allowed: facts, keys, chains, counts"),
        (('task = "facts"\n', ""), r"field 'task' is missing"),
        (("choices = 2", "choices = 3"), r"`kinds.answers` needs at least 3 different answers, got 2"),
        (("choices = 2", "choices = 'x'"), r"field 'choices': Input should be a valid integer"),
        (("{answer}", "nothing"), r"`fact` must contain \{answer\} and no other placeholder, got 'It is nothing\.'"),
        (("name = ", "name == "), r"is not valid TOML"),
        (("It is {answer}.", "It is {answer} {place}."), r"no other placeholder"),
        (('answers = ["a", "b"]', 'answers = ["a", "a"]'), r"`kinds.answers` holds 'a' twice"),
        (('answers = ["a", "b"]', 'answers = ["sun", "sunday"]'), r"'sun' and 'sunday'; no answer may be the start of another"),
        (("first = 1", "first = 2"), r"`kinds`: 2 are too few; beside the `first` 2"),
        (('summary = "s"\n', ""), r"field 'summary' is missing"),
    ],
)  # fmt: skip
def test_a_wrong_field_of_a_probe_file_is_named_with_the_nearest_valid_one(tmp_path, change, message):
    file = tmp_path / "mine.toml"
    file.write_text(GOOD.replace(*change))
    with pytest.raises(UserError, match=message):
        load_probe(str(file))


def test_unknown_probes_name_the_nearest():
    with pytest.raises(
        UserError, match=r"Unknown probe 'nedle' \(did you mean 'needle'\?\)\. Allowed: aggregate, assoc"
    ):
        load_probe("nedle")
    with pytest.raises(UserError, match=r"can't be read: No such file"):
        load_probe("nowhere.toml")
