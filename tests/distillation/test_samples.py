"""What is read in training: pure, labelled where it should be, and never what evaluation asks."""

import json

import numpy as np
import pytest

from laid_eval import UserError
from laid_eval.distillation.prose import check_disjoint, training_corpus
from laid_eval.distillation.recipe import Data
from laid_eval.distillation.samples import open_source, training_probe
from laid_eval.distillation.stretch import stretched
from laid_eval.window.haystack import load_corpus
from laid_eval.window.probes import load_probe, probe_names


@pytest.mark.parametrize("source", ["facts", "prose"])
def test_a_sample_is_a_function_of_seed_and_number(frame, source):
    data = Data(source=source, lengths=(128, 256))
    a, b = open_source(data, frame, 5), open_source(data, frame, 5)
    for number in (7, 0, 3):
        assert a.samples(number).tokens == b.samples(number).tokens
    assert a.samples(1).tokens != a.samples(2).tokens
    assert a.samples(1).tokens != open_source(data, frame, 6).samples(1).tokens


def test_labels_are_the_answers_and_the_text_states_them(frame, tokenizer):
    probe = training_probe("facts")
    source = open_source(Data(source="facts", lengths=(256, 400), questions=3), frame, 0)
    answers = {answer for kind in probe.kinds for answer in kind.answers}
    for number in range(20):
        sample = source.samples(number)
        assert len(sample.tokens) <= 400
        runs = np.split(sample.labels, np.flatnonzero(np.diff(sample.labels) > 1) + 1)
        assert 1 <= len(runs) <= 3
        for run in runs:
            answer = tokenizer.decode([sample.tokens[i] for i in run]).strip()
            assert answer in answers
            assert f" {answer}" in tokenizer.decode(sample.tokens[: run[0]])


@pytest.mark.parametrize("length", [150, 180])
def test_short_texts_ask_only_what_they_state(frame, tokenizer, length):
    source = open_source(Data(source="facts", lengths=(length, length), questions=8), frame, 0)
    for number in range(30):
        sample = source.samples(number)
        first = sample.labels[0]
        answer = tokenizer.decode([sample.tokens[first]])
        assert answer in tokenizer.decode(sample.tokens[:first])


def test_every_depth_is_planted(frame, tokenizer):
    source = open_source(Data(source="facts", lengths=(1200, 1200)), frame, 0)
    depths = []
    for number in range(30):
        sample = source.samples(number)
        text = tokenizer.decode(sample.tokens)
        start, end = text.index("question.") + 9, text.index("Question:")
        for kind in training_probe("facts").kinds:
            at = text[start:end].find(kind.fact.split("{")[0])
            if at >= 0:
                depths.append(at / (end - start))
    counts = np.histogram(depths, bins=4, range=(0, 1))[0]
    assert counts.min() > len(depths) / 10


def test_nothing_of_the_evaluation_is_trained_on():
    read = {s for section in load_corpus().sections for s in section}
    trained = {s for section in training_corpus().sections for s in section}
    assert not read & trained
    assert sum(len(s.split()) for s in trained) > 50_000
    check_disjoint(training_probe("facts"))
    for name in probe_names():
        with pytest.raises(UserError, match="shares"):
            check_disjoint(load_probe(name))
        with pytest.raises(UserError, match="is asked in evaluation"):
            training_probe(name)


def test_a_shared_answer_is_found(tmp_path):
    probe = training_probe("facts").model_dump(mode="json")
    probe["kinds"][0]["answers"][0] = "bronze"  # an answer of `needle`
    changed = type(training_probe("facts")).model_validate(probe)
    with pytest.raises(UserError, match="shares 'bronze' with probe 'needle'"):
        check_disjoint(changed)


def test_conversations_are_labelled_at_the_assistants_words(tmp_path, frame, tokenizer):
    file = tmp_path / "talk.jsonl"
    messages = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
        {"role": "assistant", "content": "Four and more."},
    ]
    file.write_text(json.dumps({"messages": messages}) + "\n\n" + json.dumps({"text": "Plain words."}) + "\n")
    source = open_source(Data(source=str(file), lengths=(16, 200)), frame, 0)
    samples = {source.samples(i).id: source.samples(i) for i in range(2)}
    talk = samples["line 1"]
    said = tokenizer.decode([talk.tokens[i] for i in talk.labels])
    assert said.replace("<|im_end|>", "").replace("\n", "") == "Two.Four and more."
    plain = samples["line 3"]
    assert list(plain.labels) == list(range(1, len(plain.tokens)))


def test_all_texts_are_read_once_before_any_is_read_again(tmp_path, frame):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": f"Text number {i}."}) + "\n" for i in range(5)))
    source = open_source(Data(source=str(file), lengths=(16, 200)), frame, 0)
    epochs = [[source.samples(5 * e + i).id for i in range(5)] for e in range(3)]
    assert all(len(set(epoch)) == 5 for epoch in epochs)
    assert epochs[0] != epochs[1] or epochs[1] != epochs[2]


def test_long_texts_are_left_out_and_counted(tmp_path, frame):
    file = tmp_path / "texts.jsonl"
    file.write_text(json.dumps({"text": "short one"}) + "\n" + json.dumps({"text": "long " * 500}) + "\n")
    source = open_source(Data(source=str(file), lengths=(16, 100)), frame, 0)
    assert source.notes == ("1 of 2 texts in texts.jsonl have more than 100 tokens and are left out",)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("not json\n", "line 1, can't be used"),
        ('{"words": 3}\n', "line 1, can't be used"),
        ('{"messages": [{"role": "user"}]}\n', "line 1, can't be used"),
        ("", "holds no text with labels; conversations need"),
        ('{"text": "The statue in the market square is made of glass."}\n', "holds a fact that probe 'needle' asks"),
    ],
)
def test_a_damaged_file_is_told_with_its_line(tmp_path, frame, content, says):
    file = tmp_path / "x.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match=says):
        open_source(Data(source=str(file)), frame, 0)


def test_unknown_data_is_told(frame):
    with pytest.raises(UserError, match="Unknown training data 'fcats'"):
        open_source(Data(source="fcats"), frame, 0)
    with pytest.raises(UserError, match="can't be read"):
        open_source(Data(source="none.jsonl"), frame, 0)


def test_stretched_positions_grow_and_reach_far_but_not_too_far(frame):
    data = Data(source="prose", lengths=(100, 100), stretch=4096)
    lasts = []
    for number in range(200):
        positions = open_source(data, frame, 0).samples(number).positions if number < 5 else None
        if positions is None:
            positions = stretched(np.arange(100), 4096, np.random.default_rng([0, number]))
        assert positions[0] == 0
        assert (np.diff(positions) >= 1).all()
        assert positions[-1] < 4096
        assert 0 <= (np.diff(positions) > 1).sum() <= 8
        lasts.append(positions[-1])
    assert np.quantile(lasts, 0.1) < 1000
    assert np.quantile(lasts, 0.9) > 3000


def test_an_image_keeps_its_shape_when_positions_are_stretched():
    base = np.stack([[0, 1, 2, 2, 2, 2, 4, 5], [0, 1, 2, 2, 3, 3, 4, 5], [0, 1, 2, 3, 2, 3, 4, 5]])
    breaks = np.array([True, True, True, False, False, False, True, True])
    moved = 0
    for seed in range(50):
        new = stretched(base, 100, np.random.default_rng(seed), breaks)
        added = new - base
        assert (added == added[0]).all()
        assert len(set(added[0, 2:6].tolist())) == 1
        moved += int(added.max() > 0)
    assert moved > 40


def test_without_room_positions_stay():
    assert stretched(np.arange(10), 10, np.random.default_rng(0)).tolist() == list(range(10))


def test_texts_too_short_for_the_facts_are_refused(frame):
    with pytest.raises(UserError, match="Texts of 60 tokens have no room for the facts"):
        open_source(Data(source="facts", lengths=(60, 60)), frame, 0).samples(0)


def test_a_fact_of_the_evaluation_is_found_however_it_is_written(tmp_path, frame):
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "\\u0054he statue  in the\\nmarket square is made of glass."}\n')
    with pytest.raises(UserError, match="holds a fact that probe 'needle' asks"):
        open_source(Data(source=str(file)), frame, 0)


def test_the_name_of_a_source_is_that_of_its_content(tmp_path, frame):
    names = []
    for word in ("one", "two"):
        file = tmp_path / "x.jsonl"
        file.write_text(json.dumps({"text": f"{word} text"}) + "\n")
        names.append(open_source(Data(source=str(file)), frame, 0).name)
    assert names[0] != names[1]
