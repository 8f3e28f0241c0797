"""Tokens around a haystack, in tokenizers of different kinds."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from laid_eval.models.frame import frame_of

TEXT = [
    "The captain of the ferry keeps a pet parrot. Question: Which pet? Answer: The captain keeps a parrot",
    "<|user|>x<|end|><|assistant|> Bronze marble iron wood Tuesday Thursday",
] * 5
CHAT = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}<|assistant|>"


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def metaspace():
    """Like SentencePiece: every text starts with a word mark."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "<s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([*TEXT, ".", "\n", "?"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture(params=[byte_level, metaspace], ids=["byte-level", "metaspace"])
def tokenizer(request):
    return request.param()


@pytest.mark.parametrize("template", [None, CHAT], ids=["base", "chat"])
def test_every_choice_reads_as_the_whole_text(tokenizer, template):
    tokenizer.chat_template = template
    frame = frame_of(tokenizer)
    choices = ["Tuesday", "Thursday", "a parrot", "wood"]
    branch = frame.branch("Which pet?", "The captain keeps", choices)
    for choice, ending in zip(choices, branch.endings, strict=True):
        assert ending, "every choice has a token of its own to be scored by"
        text = tokenizer.decode([*branch.stem, *ending]).replace(" ", "")
        assert text.endswith(f"Thecaptainkeeps{choice}".replace(" ", ""))
        assert "Question:Whichpet?" in text
        assert ("<|assistant|>" in text) == (template is not None)
    assert branch.longest == max(len(branch.stem) + len(e) for e in branch.endings)


def test_choices_of_several_tokens_share_only_their_stem(tokenizer):
    branch = frame_of(tokenizer).branch("Which day?", "On", ["Tuesday", "Thursday"])
    assert branch.endings[0] != branch.endings[1]
    assert max(len(ending) for ending in branch.endings) > 1


def test_continuation_needs_no_word_mark_of_its_own(tokenizer):
    """Sentences tokenized one by one read like the text in one piece."""
    frame = frame_of(tokenizer)
    parts = [token for text in [" The captain", " keeps a parrot."] for token in frame.continuation(text)]
    assert tokenizer.decode(parts).strip() == "The captain keeps a parrot."
    assert parts == frame.continuation(" The captain keeps a parrot.")


def test_a_start_token_comes_once_and_only_from_the_tokenizer(smollm2):
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_level()
    assert frame_of(tokenizer).opening("Read.")[0] != tokenizer.convert_tokens_to_ids("<s>")
    start = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", start)]
    )
    opening = frame_of(tokenizer).opening("Read.")
    assert opening[0] == start
    assert opening.count(start) == 1


def test_the_real_chat_template_is_respected(smollm2):
    frame = frame_of(smollm2.tokenizer)
    branch = frame.branch("Why?", "Because", ["yes", "no"])
    whole = smollm2.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Read.\n\n Some text.\n\nQuestion: Why?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    tokens = [*frame.opening("Read."), *frame.continuation(" Some text."), *branch.stem, *branch.endings[0]]
    assert smollm2.tokenizer.decode(tokens) == whole + "Because yes"
