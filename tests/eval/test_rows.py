"""What several texts begin with is computed once, and nothing is lost or done twice on the way."""

import random
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.rows import BatchLimit, Row, Target, Text, distinct_texts, is_packed, separate_rows, shared_rows

ROOMY = {"longest_text": 100, "longest_row": 100, "hidden_size": 32}
token_lists = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple), min_size=1, max_size=14, unique=True
)


def texts_of(tokens: list[tuple[int, ...]]) -> list[Text]:
    return [Text(each, (Target(index, each[-1:]),)) for index, each in enumerate(tokens)]


def price(rows: list[Row], hidden_size: int) -> float:
    return sum(row.length * (1 + row.length / (6 * hidden_size)) for row in rows)


@given(
    tokens=token_lists,
    longest_text=st.integers(1, 12),
    longest_row=st.integers(1, 30),
    most_texts=st.integers(1, 20),
    hidden=st.integers(1, 64),
)
def test_rows_hold_each_text_once_behind_what_it_shares(
    tokens: list[tuple[int, ...]], longest_text: int, longest_row: int, most_texts: int, hidden: int
) -> None:
    texts = texts_of(tokens)
    limits = {"longest_text": longest_text, "longest_row": longest_row, "most_texts": most_texts}
    rows = shared_rows(texts, **limits, hidden_size=hidden)
    assert sorted(text.tokens for row in rows for text in row.texts) == sorted(tokens)
    for row in rows:
        assert len({text.tokens[: row.shared] for text in row.texts}) == 1
        assert row.shared <= min(len(text.tokens) for text in row.texts)
        if is_packed(row):
            assert row.shared > 0
            assert len(row.texts) <= most_texts
            assert row.length <= longest_row
            assert max(len(text.tokens) for text in row.texts) <= longest_text
    assert price(rows, hidden) <= price(separate_rows(texts), hidden) + 1e-9


@settings(max_examples=40)
@given(tokens=token_lists.filter(lambda tokens: len(tokens) <= 7))
def test_no_other_division_is_cheaper(tokens: list[tuple[int, ...]]) -> None:
    ordered = sorted(tokens)
    best = float("inf")
    for count in range(len(ordered)):
        for cuts in combinations(range(1, len(ordered)), count):
            total = 0.0
            for start, end in zip((0, *cuts), (*cuts, len(ordered)), strict=True):
                group = ordered[start:end]
                shared = 0
                while all(len(each) > shared for each in group) and len({each[: shared + 1] for each in group}) == 1:
                    shared += 1
                length = sum(map(len, group)) - (len(group) - 1) * shared
                total += length * (1 + length / (6 * 32))
            best = min(best, total)
    assert price(shared_rows(texts_of(tokens), **ROOMY), 32) == pytest.approx(best)


def test_the_choices_of_a_question_share_its_tokens_and_questions_share_their_examples() -> None:
    examples = tuple(range(100, 140))
    questions = [(*examples, 7 + question, 8, 9) for question in range(3)]
    tokens = [(*question, 50 + choice, 60) for question in questions for choice in range(4)]
    rows = shared_rows(texts_of(tokens), longest_text=200, longest_row=200, hidden_size=1000)
    assert [(len(row.texts), row.shared, row.length) for row in rows] == [(12, 40, 40 + 12 * 5)]
    # Where long rows are dear, each question is one.
    rows = shared_rows(texts_of(tokens), longest_text=200, longest_row=60, hidden_size=1000)
    assert [(len(row.texts), row.shared) for row in rows] == [(4, 43)] * 3


def test_choices_of_one_token_are_one_text() -> None:
    (text,) = distinct_texts([([1, 2, 3], [4]), ([1, 2, 3], [5]), ([1, 2], [3, 6])], max_length=10)
    assert text.tokens == (1, 2, 3)
    assert [(target.request, list(target.tokens)) for target in text.targets] == [(0, [4]), (1, [5]), (2, [3, 6])]


@pytest.mark.parametrize("limit", [BatchLimit("tokens", 40), BatchLimit("texts", 5), BatchLimit("tokens", 1)])
def test_batches_stay_within_the_limit_and_mix_no_kinds(limit: BatchLimit) -> None:
    rng = random.Random(1)
    tokens = {tuple(rng.randrange(3) for _ in range(rng.randrange(1, 15))) for _ in range(60)}
    rows = shared_rows(texts_of(sorted(tokens)), **ROOMY | {"longest_row": 20})
    assert len({is_packed(row) for row in rows}) == 2
    start, sizes = 0, []
    while start < len(rows):
        end = limit.end(rows, start)
        batch = rows[start:end]
        assert batch
        assert len({is_packed(row) for row in batch}) == 1
        padded = max(row.length for row in batch) * len(batch)
        size = padded if limit.kind == "tokens" else sum(len(row.texts) for row in batch)
        assert size <= limit.most or len(batch) == 1
        sizes.append(len(batch))
        start = end
    assert sum(sizes) == len(rows)
    assert max(sizes) > 1 or limit.most == 1


def test_half_of_a_limit_is_at_least_one() -> None:
    assert BatchLimit("texts", 7).halved() == BatchLimit("texts", 3)
    assert BatchLimit("tokens", 1).halved() == BatchLimit("tokens", 1)
