"""Examples of random tokens, as long as real Alpaca examples are."""

import random

import pandas as pd

from neft_utils.base.paths import PACKAGE

ALPACA_LENGTHS = PACKAGE / "facts" / "alpaca_lengths.csv"
MAX_TOKENS = 512  # of an example; 2.5 % of the rows in ALPACA_LENGTHS are longer
SEED = 0


def length_histogram(rows, tokenizer):
    """Rows by their numbers of tokens: prompt_tokens, response_tokens, rows; sorted.

    rows: [{"instruction", "input", "output"}]. Prompts stand in Alpaca's templates, with or
    without an input; a response's count includes its end token.
    """
    from neft_utils.data.layouts import INPUT
    from neft_utils.train.encoding import alpaca_prompt

    columns, lengths = ["prompt_tokens", "response_tokens"], []
    for row in rows:
        prompt = alpaca_prompt(row["instruction"] + (INPUT + row["input"] if row["input"] else ""))
        response = tokenizer(row["output"], add_special_tokens=False)["input_ids"]
        lengths.append((len(tokenizer(prompt)["input_ids"]), len(response) + 1))
    return pd.DataFrame(lengths, columns=columns).groupby(columns).size().reset_index(name="rows")


def alpaca_lengths():
    """`length_histogram` of 999 rows of an English Alpaca set, numbers without their texts.

    Counted with SmolLM2's tokenizer: its 49,152 words make slightly fewer tokens of a text
    than Llama-2's 32,000. Answers are longer than the first Alpaca's: mean 206 tokens an
    example, where that one has 128.
    """
    return pd.read_csv(ALPACA_LENGTHS)


def drawn_lengths(count, seed=SEED, max_tokens=MAX_TOKENS):
    """[(prompt, response)] tokens of `count` examples drawn from `alpaca_lengths`.

    A long example loses the end of its response, as truncation does; one token stays.
    """
    table = alpaca_lengths()
    pairs = list(zip(table.prompt_tokens.tolist(), table.response_tokens.tolist(), strict=True))
    drawn = random.Random(seed).choices(pairs, weights=table["rows"].tolist(), k=count)
    drawn = [(min(prompt, max_tokens - 1), response) for prompt, response in drawn]
    return [(prompt, min(response, max_tokens - prompt)) for prompt, response in drawn]


def random_examples(count, vocabulary, seed=SEED):
    """Encoded examples of random tokens; ids 0 and 1 are kept for start, end and padding."""
    generator = random.Random(seed)
    return [
        {
            "input_ids": generator.choices(range(2, vocabulary), k=prompt + response),
            "completion_mask": [0] * prompt + [1] * response,
        }
        for prompt, response in drawn_lengths(count, seed)
    ]
