"""Plain text as BERT reads it, BERT itself, and LAMB."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from bert_pretraining import (
    IGNORED,
    SPECIAL,
    Bert,
    Lamb,
    Tokenizer,
    lines_of,
    make_text,
    mask,
    sequences_of,
    warmup_then_linear,
    words_of,
)


def spelt(tokenizer, numbers):
    return [tokenizer.tokens[number] for number in numbers]


def test_lines_come_from_a_file_or_from_all_text_files_of_a_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes(b"third\n\xff is no UTF-8\n")
    (tmp_path / "a.txt").write_text("first\n\n   \n second \n")
    (tmp_path / "sub" / "c.txt").write_text("fifth")
    (tmp_path / "notes.md").write_text("not this")
    assert list(lines_of(tmp_path)) == ["first", "second", "third", "\ufffd is no UTF-8", "fifth"]
    assert list(lines_of(tmp_path / "notes.md")) == ["not this"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"has no \.txt files"):
        list(lines_of(tmp_path / "empty"))


def test_a_word_is_its_longest_pieces():
    tokenizer = Tokenizer([*SPECIAL, "u", "un", "##aff", "##affable", "##able", "##n"])
    assert spelt(tokenizer, tokenizer.word("unaffable")) == ["un", "##affable"]
    assert spelt(tokenizer, tokenizer.word("unaffaffable")) == ["un", "##aff", "##affable"]
    assert spelt(tokenizer, tokenizer.word("unaffed")) == ["[UNK]"]
    assert spelt(tokenizer, tokenizer.word("unn")) == ["un", "##n"]
    assert spelt(tokenizer, tokenizer.word("able")) == ["[UNK]"]
    assert words_of("It's naïve, 3x!") == ["it", "'", "s", "naïve", ",", "3x", "!"]


def test_a_vocabulary_made_from_text_can_spell_all_of_it(tmp_path):
    lines = ["the cat sat on the mat", "the dog sat"]
    tokenizer = Tokenizer.of_text(lines, 5 + 2 * 11 + 2)
    assert tokenizer.tokens[:5] == list(SPECIAL)
    assert tokenizer.tokens[-2:] == ["the", "sat"]
    assert spelt(tokenizer, tokenizer.word("mat")) == ["m", "##a", "##t"]
    assert spelt(tokenizer, tokenizer.word("zoo")) == ["[UNK]"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokenizer.tokens) + "\n")
    assert Tokenizer.of_file(tmp_path / "vocab.txt").tokens == tokenizer.tokens
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\nword\n")
    with pytest.raises(SystemExit, match=r"no \[SEP\], \[MASK\]"):
        Tokenizer.of_file(tmp_path / "vocab.txt")


def test_text_is_cut_into_sequences():
    tokenizer = Tokenizer([*SPECIAL, *"abcdefg"])
    sequences = sequences_of(["a b c", "d e f g"], tokenizer, 5)
    assert [spelt(tokenizer, row) for row in sequences] == [
        ["[CLS]", "a", "b", "c", "[SEP]"],
        ["[CLS]", "d", "e", "f", "[SEP]"],
    ]
    assert sequences_of(["a"], tokenizer, 5).shape == (0, 5)


def test_masking_rates():
    tokenizer = Tokenizer([*SPECIAL, *map(str, range(995))])
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 1000, (2000, 128), generator=draw)
    tokens[:, 0], tokens[:, -1] = tokenizer.first, tokenizer.last
    seen, answers = mask(tokens, tokenizer, draw)
    asked = answers != IGNORED
    assert not asked[:, [0, -1]].any()
    assert torch.equal(answers[asked], tokens[asked])
    assert torch.equal(seen[~asked], tokens[~asked])

    def rate(condition, of):
        # Within five standard deviations.
        return pytest.approx(condition.float().mean().item(), abs=5 * math.sqrt(0.25 / len(of)))

    assert rate(asked[:, 1:-1], asked[:, 1:-1].flatten()) == 0.15
    masked, same = seen[asked] == tokenizer.mask, seen[asked] == tokens[asked]
    assert rate(masked, masked) == 0.8
    assert rate(same, same) == 0.1 + 0.1 / 1000
    random = seen[asked][~masked & ~same]
    # Anything, not just neighbours of what was there.
    assert len(random.unique()) > 900


def test_what_is_made_can_be_read(tmp_path):
    make_text(tmp_path / "text")
    tokenizer = Tokenizer.of_text(lines_of(tmp_path / "text"), 200)
    sequences = sequences_of(lines_of(tmp_path / "text"), tokenizer, 32)
    assert len(sequences) > 2000
    assert tokenizer.unknown not in sequences


def test_bert_large_has_the_size_it_should():
    with torch.device("meta"):
        model = Bert()
    encoder = 24 * (4 * (1024 * 1024 + 1024) + 2 * 4 * 1024 * 1024 + 4096 + 1024 + 2 * 2 * 1024)
    embeddings = 30522 * 1024 + 512 * 1024 + 2 * 1024
    head = 1024 * 1024 + 1024 + 2 * 1024 + 30522
    assert sum(p.numel() for p in model.parameters()) == encoder + embeddings + head


def test_only_what_is_asked_is_computed():
    torch.manual_seed(0)
    model = Bert(50, 8, 16, 1, 2).eval()
    tokens = torch.randint(50, (3, 8))
    asked = torch.rand(3, 8) < 0.5
    torch.testing.assert_close(
        model(tokens, asked), model(tokens, torch.ones(3, 8, dtype=torch.bool)).view(3, 8, 50)[asked]
    )
    assert not torch.allclose(model(tokens, asked), model(tokens.flip(1), asked.flip(1)), atol=1e-3)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lamb_takes_the_step_of_its_paper(weight_decay):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    optimizer = Lamb([p], lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=weight_decay)
    x = p.detach().flatten().tolist()
    m, v = [0.0] * 12, [0.0] * 12
    for step in range(1, 4):
        p.grad = torch.randn(3, 4, dtype=torch.float64)
        g = p.grad.flatten().tolist()
        optimizer.step()
        m = [0.8 * a + 0.2 * b for a, b in zip(m, g, strict=True)]
        v = [0.9 * a + 0.1 * b * b for a, b in zip(v, g, strict=True)]
        r = []
        for a, b, w in zip(m, v, x, strict=True):
            r.append(a / (1 - 0.8**step) / (math.sqrt(b / (1 - 0.9**step)) + 1e-3) + weight_decay * w)
        trust = math.hypot(*x) / math.hypot(*r) if weight_decay else 1.0
        x = [w - 0.1 * trust * u for w, u in zip(x, r, strict=True)]
        assert p.detach().flatten().tolist() == pytest.approx(x, rel=1e-12)


def test_lamb_moves_what_is_zero_and_resumes():
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = Lamb([p], lr=0.1)
    p.grad = torch.tensor([1.0, -1.0])
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([-0.1, 0.1]), atol=1e-6, rtol=0)
    q = torch.nn.Parameter(p.detach().clone())
    other = Lamb([q], lr=0.1)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter, mine in ((p, optimizer), (q, other)):
        parameter.grad = torch.tensor([0.5, 2.0])
        mine.step()
    assert torch.equal(p, q)


def test_the_learning_rate_rises_and_falls_linearly():
    rates = [warmup_then_linear(step, 10, 4) for step in range(10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
