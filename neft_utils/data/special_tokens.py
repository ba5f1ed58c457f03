"""Rows whose text spells a special token: a tokenizer would take it for the token itself."""


def spells_no_special_token(tokenizer):
    """A filter of rows: true where neither prompt nor response spells a special token.

    tokenizer: of transformers. A tokenizer reads "<|im_end|>" within a text as the token that ends
    a turn: the model would learn to stop in mid-answer, and a user could speak as the assistant.
    transformers' own switch against it, split_special_tokens, would split the chat template's
    tokens too.
    """
    added = tokenizer.added_tokens_decoder.values()
    special = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)

    def keeps(row):
        return not any(mark in row[part] for part in ("prompt", "response") for mark in special)

    return keeps
