"""Recipes: the ablation is whole, and a mistake in a file is named."""

import pytest

from laid_eval import UserError
from laid_eval.distillation.recipe import changed, load_recipe, recipe_names
from laid_eval.resources import content_hash


def test_the_ablation_is_whole():
    assert recipe_names() == ["gain-only", "laid", "paper", "sft", "sft-kl", "sft-kl-attn"]
    recipes = {name: load_recipe(name) for name in recipe_names()}
    assert all(recipe.name == name for name, recipe in recipes.items())
    assert not recipes["sft"].needs_teacher
    assert recipes["sft-kl"].needs_teacher
    assert not recipes["sft-kl"].matches
    plain = recipes["sft-kl-attn"].matching
    assert (plain.kappa, plain.gamma) == (0.0, 0.0)  # row KL, tested in the core
    assert recipes["paper"].losses.qk > 0
    assert recipes["paper"].losses.attention == 0
    assert recipes["laid"].gain is not None
    assert recipes["gain-only"].training.weights == "none"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            'name = "x"\nsummary = ""\n[losses]\nsfd = 1',
            "unknown field 'losses.sfd' (did you mean 'sft'?). Allowed: sft",
        ),
        ('name = "x"\nsummary = ""\n[losses]\nsft = 1\n[gian]', "unknown field 'gian' (did you mean 'gain'?)"),
        (
            'name = "x"\nsummary = ""\n[losses]\nsft = 1\n[gain]\nsharring = "head"',
            "unknown field 'gain.sharring' (did you",
        ),
        (
            'name = "x"\nsummary = ""\n[losses]\nsft = -1',
            "field 'losses.sft': Input should be greater than or equal to 0",
        ),
        ('name = "x"\nsummary = ""\n[losses]', "all terms are 0"),
        ('name = "x"\nsummary = ""', "field 'losses' is missing"),
        ('name = "x"\nsummary = ""\n[losses]\nsft = 1\n[training]\nweights = "none"', "nothing would be trained"),
        (
            'name = "x"\nsummary = ""\n[losses]\nsft = 1\n[data]\nlengths = [90, 30]',
            "`lengths` must be [shortest, longest]",
        ),
        ('name = "x"\nsummary = ""\n[losses]\nsft = 1\n[data]\nstretch = 99', "`stretch` 99 is below the longest text"),
        ("name = ", "is not valid TOML"),
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path, text, says):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        load_recipe(str(file))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_recipe_and_a_missing_file_are_told():
    with pytest.raises(UserError, match=r"Unknown recipe 'lad' \(did you mean 'laid'\?\)"):
        load_recipe("lad")
    with pytest.raises(UserError, match="can't be read"):
        load_recipe("none.toml")


def test_fields_are_set_anew_and_checked():
    recipe = load_recipe("sft")
    new = changed(recipe, {"training.steps": "7", "data.source": "mine.jsonl", "gain.sharing": "layer"})
    assert (new.training.steps, new.data.source, new.gain.sharing) == (7, "mine.jsonl", "layer")
    assert content_hash(new) != content_hash(recipe)
    assert content_hash(changed(recipe, {"training.steps": str(recipe.training.steps)})) == content_hash(recipe)
    with pytest.raises(UserError, match=r"unknown field 'training.stesp' \(did you mean 'steps'\?\)"):
        changed(recipe, {"training.stesp": "7"})
