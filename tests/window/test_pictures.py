"""Picture stories: right answers are right, nothing is guessable without the pictures, the wording is the original's."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest, chisquare

from laid_eval.errors import UserError
from laid_eval.window.pictures import draw_pictures
from laid_eval.window.probes import load_probe, load_probes

CUTS = (3, 8, 20, 60)
VISUAL = ("visual-which", "visual-haystack", "visual-all", "visual-any")


def stories(name, count=60, cuts=CUTS):
    probe = load_probe(name)
    for seed in range(count):
        rng = np.random.default_rng([7, seed])
        yield draw_pictures(probe, cuts, rng), rng


def asked(prompt):
    """Anchor and target, as a reader of the words finds them."""
    words = prompt.rstrip("?").replace(",", "").split()
    articles = [i for i, word in enumerate(words) if word in ("a", "an")]
    return words[articles[-2] + 1] if len(articles) > 2 else words[-4], words[articles[-1] + 1]


@pytest.mark.parametrize("name", VISUAL)
def test_anchors_are_in_their_own_pictures_alone(name):
    for story, _ in stories(name):
        probe = story.probe
        assert len(story.scenes) == CUTS[-1]
        assert {len(set(scene.objects)) for scene in story.scenes} == {probe.per_image}
        assert len(story.groups) == probe.anchors
        assert story.groups[0].images[-1] < CUTS[0]
        for group in story.groups:
            holders = tuple(i for i, scene in enumerate(story.scenes) if group.anchor in scene.objects)
            assert holders == group.images
            assert len(holders) == probe.needles


def test_right_answers_are_in_the_pictures():
    for story, rng in stories("visual-which"):
        for seen in CUTS:
            questions = story.questions(seen, rng)
            assert questions
            shown = {name for scene in story.scenes[:seen] for name in scene.objects}
            for q in questions:
                here = story.scenes[q.needle].objects
                names = [choice.split(maxsplit=1)[1] for choice in q.choices]
                assert q.needle < seen
                assert len(set(names)) == 8
                assert [name in here for name in names] == [i == q.answer for i in range(8)]
                elsewhere = len(shown - set(here) - {g.anchor for g in story.groups})
                assert sum(name in shown for name in names) == 1 + min(7, elsewhere)


@pytest.mark.parametrize("name", ["visual-haystack", "visual-all", "visual-any"])
def test_yes_and_no_are_true(name):
    """Against a reader that looks at the objects of every picture."""
    rule = {"visual-haystack": any, "visual-all": all, "visual-any": any}[name]
    answers = []
    for story, rng in stories(name):
        for q in story.questions(CUTS[-1], rng):
            words = q.prompt.split(": ", 1)[1]
            anchor = next(g.anchor for g in story.groups if g.anchor in words.split(",")[0])
            target = words.rstrip("?").split()[-1]
            truth = rule(target in s.objects for s in story.scenes if anchor in s.objects)
            assert q.choices == ("Yes", "No")
            assert (q.answer == 0) == truth
            answers.append(q.answer)
    assert binomtest(sum(answers), len(answers)).pvalue > 1e-3


def test_the_wording_is_the_originals():
    lead = "You are given a set of images. Please answer the following question in Yes or No: "
    wanted = {
        "visual-haystack": "For the image with {a} {anchor}, is there {b} {target}?",
        "visual-all": "For all images with {anchor}, do all of them contain {b} {target}?",
        "visual-any": "For all images with {anchor}, do any of them contain {b} {target}?",
    }
    for name, text in wanted.items():
        for story, rng in stories(name, 5):
            for q in story.questions(CUTS[-1], rng):
                anchor = next(g.anchor for g in story.groups if g.images[-1] == q.needle)
                target = q.prompt.rstrip("?").split()[-1]
                a, b = ("an" if word[0] in "aeiou" and word != "unicorn" else "a" for word in (anchor, target))
                assert q.prompt == lead + text.format(a=a, b=b, anchor=anchor, target=target)


@pytest.mark.parametrize("name", ["visual-haystack", "visual-all", "visual-any"])
def test_a_reader_of_the_words_alone_is_at_chance(name):
    """Rates of yes by anchor and by target, learnt from half of the questions, say nothing about the other half."""
    rows = []
    for story, rng in stories(name, 500 if name == "visual-haystack" else 2000):
        rows += [(*asked(q.prompt), q.answer == 0) for q in story.questions(CUTS[-1], rng)]
    half = len(rows) // 2
    rate = {k: Counter(row[k] for row in rows[:half] if row[2]) for k in (0, 1)}
    base = {k: Counter(row[k] for row in rows[:half]) for k in (0, 1)}
    right = 0
    for row in rows[half:]:
        score = sum(rate[k][row[k]] / base[k][row[k]] - 0.5 for k in (0, 1) if base[k][row[k]])
        right += (score > 0) == row[2]
    assert binomtest(right, len(rows) - half).pvalue > 1e-3, right / (len(rows) - half)


@pytest.mark.parametrize("seen", CUTS[1:])
def test_a_reader_that_counts_objects_gains_little(seen):
    """It knows how often each object was seen, and not where."""
    right = []
    for story, rng in stories("visual-which", 200):
        counts = Counter(name for scene in story.scenes[:seen] for name in scene.objects)
        for q in story.questions(seen, rng):
            seen_often = [counts[choice.split(maxsplit=1)[1]] for choice in q.choices]
            best = max(seen_often)
            right.append((seen_often[q.answer] == best) / seen_often.count(best))
    assert np.mean(right) < 1 / 8 + 0.06


def test_places_and_names_of_right_answers_are_even():
    questions = [q for story, rng in stories("visual-which", 300) for q in story.questions(CUTS[-1], rng)]
    places = np.bincount([q.answer for q in questions], minlength=8)
    assert chisquare(places).pvalue > 1e-3
    names = Counter(q.choices[q.answer] for q in questions)
    assert chisquare([names[name] for name in names]).pvalue > 1e-4
    assert len(names) == 64


@pytest.mark.parametrize("name", VISUAL)
def test_what_was_not_yet_shown_changes_no_question(name):
    story = next(stories(name, 1))[0]
    some = [replace(story, scenes=story.scenes[:n]) for n in (20, 60)]
    first, second = (s.questions(20, np.random.default_rng(3)) for s in some)
    assert first == second
    assert first


def test_probes_of_text_and_of_pictures_are_not_mixed():
    with pytest.raises(UserError, match="needle are counted in tokens, those of visual-which in images"):
        load_probes(["needle", "visual-which"])
    assert {probe.unit for probe in load_probes(["all"])} == {"tokens"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ('form = "all"', "`needles` is 2 or 3"),
        ("choices = 4", "`choices` must be 2"),
        ('objects = ["tiger", "bus"]', "at least"),
        ('question = "What is there?"', "must contain {anchor} and {target}"),
        ("per_image = 99", "less than or equal to 6"),
    ],
)
def test_a_wrong_probe_is_told(tmp_path, change, says):
    field = change.split(" =")[0]
    text = (load_text("visual-haystack")).splitlines()
    kept = "\n".join(line for line in text if not line.startswith(field + " "))
    if field == "objects":
        kept = kept.split("\n  ")[0]
    (tmp_path / "mine.toml").write_text(f"{kept}\n{change}\n")
    with pytest.raises(UserError) as caught:
        load_probe(str(tmp_path / "mine.toml"))
    assert says in str(caught.value)


def load_text(name):
    from laid_eval.resources import bundled

    return (bundled("probes") / f"{name}.toml").read_text()
