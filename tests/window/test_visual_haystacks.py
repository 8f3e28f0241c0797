"""The published data set: format, prompt, orders, positions, missing pictures, bad files."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from laid_eval.errors import UserError
from laid_eval.window.visual_haystacks import needle_places, visual_haystacks

spec = importlib.util.spec_from_file_location("published_haystacks", Path(__file__).parent / "published_haystacks.py")
published = importlib.util.module_from_spec(spec)
spec.loader.exec_module(published)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return published.write_dataset(tmp_path_factory.mktemp("vhs"))


def entries(path):
    return json.loads(path.read_text())


def rewritten(tmp_path, path, change):
    content = entries(path)
    change(content)
    other = tmp_path / path.name
    other.write_text(json.dumps(content))
    return other


def test_the_fixture_is_balanced_and_the_same_again(written, tmp_path):
    files, images = written
    again, others = published.write_dataset(tmp_path)
    for one, two, length in zip(files, again, (1, 2, 5), strict=True):
        assert one.read_bytes() == two.read_bytes()
        said = [entry["conversations"][1]["value"] for entry in entries(one)]
        assert said.count("yes") == said.count("no") == 4
        for entry in entries(one):
            assert len(entry["pos_image"] + entry["neg_image"]) == length
            for name in entry["pos_image"]:
                assert (images / name).read_bytes() == (others / name).read_bytes()


def test_the_prompt_is_the_published_one(written):
    files, images = written
    view = next(visual_haystacks(files[1:2], images).views(0))
    asked = entries(files[1])[0]["conversations"][0]["value"]
    prompt = "You are given a set of images. Please answer the following question in Yes or No: "
    assert view.question.prompt == prompt + asked
    assert asked.startswith("For the image with a")
    assert (view.question.lead, view.question.choices) == ("", ("Yes", "No"))
    assert view.question.choices[view.question.answer].lower() == entries(files[1])[0]["conversations"][1]["value"]


def test_order_follows_from_seed_and_case(written):
    files, images = written
    data = visual_haystacks(files[2:], images)
    views = list(data.views(0))
    assert [v.pictures for v in views] == [v.pictures for v in visual_haystacks(files[2:], images).views(0)]
    assert [v.pictures for v in views] != [v.pictures for v in data.views(1)]
    orders = []
    for view, entry in zip(views, entries(files[2]), strict=True):
        both = entry["pos_image"] + entry["neg_image"]
        assert sorted(view.pictures) == sorted(both)
        assert view.pictures[view.needle] == entry["pos_image"][0]
        assert view.depth == (view.needle + 0.5) / 5
        orders.append(tuple(both.index(name) for name in view.pictures))
    assert len(set(orders)) > 4
    assert len({view.needle for view in views}) > 1


def test_needles_come_anywhere(written):
    files, images = written
    data = visual_haystacks(files[2:], images)
    places = [view.needle for seed in range(60) for view in data.views(seed)]
    counts = np.bincount(places, minlength=5)
    assert counts.min() > 0.6 * len(places) / 5


def test_of_several_needles_the_earliest_counts(tmp_path):
    files, images = published.write_dataset(tmp_path, lengths=(5,), probe="visual-all")
    for view in visual_haystacks(files, images).views(0):
        assert len(view.case.positive) == 3
        assert view.needle == min(view.pictures.index(name) for name in view.case.positive)
    with pytest.raises(UserError, match=r"--positions moves one needle; case 1 of .*visual_haystack_5\.json' has 3"):
        visual_haystacks(files, images, positions=True)


@pytest.mark.parametrize("images", [1, 2, 3, 5, 10, 20, 50, 100, 500, 1000, 10000])
def test_positions_are_the_published_ones(images):
    places = needle_places(images)
    assert len(places) == min(images, 10)
    interval = max(images // 10, 1)
    assert places == [k * interval for k in range(len(places))]


def test_positions_keep_the_order_of_the_others(written):
    files, images = written
    entry = entries(files[2])[0]
    views = list(visual_haystacks(files[2:], images, positions=True, questions=1).views(0))
    assert [view.needle for view in views] == [0, 1, 2, 3, 4]
    for at, view in enumerate(views):
        assert view.pictures[at] == entry["pos_image"][0]
        assert [name for name in view.pictures if name not in entry["pos_image"]] == entry["neg_image"]
    assert len({view.name for view in views}) == 5


def test_files_take_turns_and_questions_limits_each(written):
    files, images = written
    cases = visual_haystacks(files, images, questions=2).cases
    assert [case.length for case in cases] == [1, 2, 5, 1, 2, 5]
    assert [case.id for case in cases] == ["100"] * 3 + ["101"] * 3


def test_the_same_question_about_the_same_needle_is_one_cluster(written, tmp_path):
    files, images = written
    grown = entries(files[1])
    for entry in grown:
        entry["neg_image"] = entry["neg_image"] * 2
    longer = tmp_path / "visual_haystack_3.json"
    longer.write_text(json.dumps(grown))
    cases = visual_haystacks([files[1], longer], images).cases
    assert len({case.haystack for case in cases}) == 8
    assert all(a.haystack == b.haystack for a, b in zip(cases[::2], cases[1::2], strict=True))


def test_missing_pictures_are_named_counted_refused_or_left_out(tmp_path):
    files, images = published.write_dataset(tmp_path, lengths=(2, 5), cases=4)
    first = entries(files[0])[0]
    for name in (first["pos_image"][0], first["neg_image"][0], entries(files[1])[2]["neg_image"][1]):
        (images / name).unlink()
    with pytest.raises(UserError) as caught:
        visual_haystacks(files, images)
    said = str(caught.value)
    assert said.startswith("3 of 28 pictures (")
    assert first["pos_image"][0] in said
    assert "2 of 8 cases need them" in said
    assert "--allow-missing" in said
    assert "\n" not in said
    kept = visual_haystacks(files, images, allow_missing=True)
    assert len(kept.cases) == 6
    assert "2 of 8 cases were left out: 3 of 28 pictures (" in kept.notes[0]
    assert kept.notes[1] == "the right answer is yes in 2 of 6 cases"
    assert kept.hash != visual_haystacks(files, images, allow_missing=True, questions=2).hash
    for path in images.rglob("*.*"):
        path.unlink()
    with pytest.raises(UserError, match=r"28 of 28 pictures .* and 23 more") as caught:
        visual_haystacks(files, images, allow_missing=True)
    assert "--allow-missing" not in str(caught.value)


def drop(field):
    return lambda content: content[2].pop(field)


def put(*path):
    def change(content):
        *way, last, value = path
        for step in way:
            content = content[step]
        content[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop("conversations"), "case 3: field 'conversations' is missing"),
        (drop("pos_image"), "case 3: field 'pos_image' is missing"),
        (drop("neg_image"), "case 3: field 'neg_image' is missing"),
        (drop("id"), "case 3: field 'id' is missing"),
        (put(1, "conversations", 1, {"from": "gpt"}), "case 2: field 'conversations.1.value' is missing"),
        (put(1, "conversations", 1, "value", "maybe"), "'conversations.1.value' must be 'yes' or 'no', got 'maybe'"),
        (put(1, "conversations", []), "case 2: field 'conversations' is wrong"),
        (put(0, "pos_image", []), "case 1: field 'pos_image' is wrong"),
        (put(0, "pos_image", "a.jpg"), "case 1: field 'pos_image' is wrong"),
        (put(0, "neg_image", 0, 7.5), "case 1: field 'neg_image.0' is wrong"),
        (put(3, 17), "case 4: it is wrong"),
        (put(0, "pos_image", 0, "../../secret.png"), "'../../secret.png' lies outside --images"),
    ],
)
def test_a_wrong_case_is_named(written, tmp_path, change, says):
    files, images = written
    bad = rewritten(tmp_path, files[1], change)
    with pytest.raises(UserError) as caught:
        visual_haystacks([bad], images, allow_missing=True)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [("", "not valid JSON"), ("{}", "holds no list of cases"), ("[]", "no list"), ("[" * 99999, "not valid JSON")],
)
def test_a_wrong_file_is_named(written, tmp_path, content, says):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(UserError, match=says):
        visual_haystacks([tmp_path / "bad.json"], written[1])
    with pytest.raises(UserError, match=r"none\.json' can't be read"):
        visual_haystacks([tmp_path / "none.json"], written[1])


def test_options_are_checked(written, tmp_path):
    files, images = written
    for options, says in (
        ({"protocol": "publishd"}, "Unknown --protocol 'publishd'. Allowed: seeded, published"),
        ({"questions": 0}, "--questions must be at least 1"),
        ({"images": tmp_path / "none"}, "is not a folder"),
    ):
        with pytest.raises(UserError, match=says):
            visual_haystacks(files, **{"images": images, **options})


def test_a_damaged_picture_is_found_before_anything_is_measured(tmp_path):
    files, images = published.write_dataset(tmp_path, lengths=(2,), cases=2)
    name = entries(files[0])[1]["neg_image"][0]
    (images / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"Picture '{name}' .* can't be read"):
        visual_haystacks(files, images, allow_missing=True)
