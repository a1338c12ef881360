"""GGUF files in llama.cpp itself: logits, tokens, and how it cuts text.

Skipped without llama-cpp-python, which compiles llama.cpp when it is installed; 0.3.36 was run.
"""

import pytest

from mohawk.export.gguf_check import answered
from mohawk.models.formats.gguf import write_gguf
from tests.mohawk.export.test_export import exported
from tests.mohawk.export.test_gguf import SENTENCEPIECE, STUDENTS, TOKENIZERS, WORDS, sentencepiece, student_of

llama_cpp = pytest.importorskip("llama_cpp")

TEXTS = [
    *WORDS,
    "  leading and trailing  ",
    "<eos>mid<bos> don't DON'T we'll",
    "\n\n\n \n x" + "a" * 50,
    "١٢٣ ٤٥٦ ½ Ⅷ 12a3 👩‍👩‍👧 ǅ ʰ ªº",
]


@pytest.mark.parametrize("name", STUDENTS)
def test_the_same_answers(name, tmp_path):
    """Whole, by prefill and steps, and greedily: of 300, 24 and 16 tokens."""
    student = STUDENTS[name]().eval()
    write_gguf(student, tmp_path / "x.gguf")
    rows = answered(tmp_path / "x.gguf", student, None, exact=True)
    assert len(rows) == 3 and all(row.passed for row in rows), rows
    assert rows[2].same == "all" or rows[2].same.startswith("up to a tie")


def test_a_text_that_ends_at_once(tmp_path):
    """Greedy tokens are compared as they come, those that end a text among them."""
    student = STUDENTS["llama"]().eval()
    student.generation_config.eos_token_id = list(range(student.config.vocab_size))
    write_gguf(student, tmp_path / "x.gguf")
    rows = answered(tmp_path / "x.gguf", student, None, exact=True)
    assert len(rows) == 3 and all(row.passed for row in rows), rows


@pytest.mark.parametrize("outtype", ["bf16", "q8_0"])
@pytest.mark.parametrize("name", ["llama", "delta"])
def test_rounded_weights(name, outtype, tmp_path):
    """Not far from the student: llama.cpp rounds activations as the file does weights."""
    student = STUDENTS[name]().eval()
    write_gguf(student, tmp_path / "x.gguf", outtype)
    full, steps, greedy = answered(tmp_path / "x.gguf", student, None, exact=False)
    largest = 2.2  # logit of these students
    assert full.difference < largest / 5 and steps.difference < largest / 5
    assert float(full.same.rstrip("%")) > 85


@pytest.mark.parametrize("name", TOKENIZERS | SENTENCEPIECE)
def test_text_is_cut_into_the_same_tokens(name, tmp_path):
    tokenizer = (TOKENIZERS | SENTENCEPIECE)[name]()
    write_gguf(student_of(vocab_size=600), tmp_path / "x.gguf", tokenizer=tokenizer)
    model = llama_cpp.Llama(str(tmp_path / "x.gguf"), vocab_only=True, verbose=False)
    for text in TEXTS:
        expected = tokenizer(text)["input_ids"]
        assert model.tokenize(text.encode(), add_bos=True, special=True) == expected, text
        assert model.detokenize(expected, special=True).decode().strip() == tokenizer.decode(expected).strip()


def test_a_metaspace_only_in_front(tmp_path):
    """Its first word may follow a space of its own; llama.cpp puts one more there, and behind each special token."""
    tokenizer = sentencepiece(metaspace="first")
    write_gguf(student_of(vocab_size=600), tmp_path / "x.gguf", tokenizer=tokenizer)
    model = llama_cpp.Llama(str(tmp_path / "x.gguf"), vocab_only=True, verbose=False)
    same = [model.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text)["input_ids"] for text in TEXTS]
    assert [text for text, one in zip(TEXTS, same, strict=True) if not one] == TEXTS[3:5]


def test_every_export_is_run_there(tmp_path):
    tokenizer = TOKENIZERS["smollm"]()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    student_of(vocab_size=600).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    folder, screen = exported(tmp_path / "student", "gguf")
    assert screen.count(" ok") == 5 and "llama.cpp (checked): as granitehybrid" in screen
    assert "| llama.cpp | yes | as granitehybrid" in (folder / "README.md").read_text()
    model = llama_cpp.Llama(str(folder / "student-f32.gguf"), n_ctx=64, verbose=False)
    assert model.metadata["tokenizer.chat_template"] == tokenizer.chat_template
    answer = model.create_completion("Hello, World!", max_tokens=3, temperature=0)
    assert answer["usage"]["prompt_tokens"] == len(tokenizer("Hello, World!")["input_ids"])
