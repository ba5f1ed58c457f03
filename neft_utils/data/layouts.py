"""A record in one of the layouts that people have becomes a prompt and its answer, or is left out.

What cannot be a row without becoming another one is left out and counted by its reason (`Unfit`);
what nobody can mean is refused (`DataError`). Of a conversation the first exchange is the row:
its answer is the only one that needs no turn before it.
"""

import contextlib
import json
import math
from collections import Counter
from decimal import Decimal

from neft_utils.data.records import DataError

INPUT = "\n\n### Input:\n"  # Stanford Alpaca's heading of what an instruction speaks about
WANTED = (
    "(instruction, output, optional input), (prompt, response), messages [{role, content}] or"
    " conversations [{from, value}]"
)
PROMPTS, ANSWERS = ("instruction", "prompt"), ("output", "response", "completion")
INPUTS, SYSTEMS = ("input", "context"), ("system", "system_prompt")
TALKS = ("messages", "conversations", "conversation")
CALLS = ("tools", "functions", "tool_calls", "tool_call", "function_call", "tool_call_id")
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
WEIGHTS = ("weight", "loss_weight", "train", "training")  # of a turn; the first two of a row

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "ai", "chatgpt", "chatbot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "environment"), "tool"),
    **dict.fromkeys(("tool_call", "function_call", "tool_response"), "tool"),
    **dict.fromkeys(("tool_calls", "tool_result", "function_response"), "tool"),
}

# Names of the filters that leave a record out: what the rows that stay have.
NO_TOOLS = "neither tools nor calls of them"
TRAINED = "no answer of weight 0"
NO_HISTORY = "no turns before the prompt"
ONLY_TEXT = "text only"
IN_ORDER = "begins with a prompt and its answer"
FILTERS = (NO_TOOLS, TRAINED, NO_HISTORY, ONLY_TEXT, IN_ORDER)


class Unfit(Exception):
    """A record that makes no row; its text is the filter that leaves it out."""


class Reader:
    """Reads records one by one and counts what it did to them: `left_out`, and `remarks()`."""

    def __init__(self):
        self.left_out, self._unused = Counter(), Counter()
        self._talks = self._later = self._systems = 0
        self._answers, self._first = 0, None

    def texts(self, record, where):
        """(prompt, answer) of a record, None if it is left out; either may be empty.

        where: place of the record, for messages. Raises DataError.
        """
        try:
            return self._texts(_lower(record), where)
        except Unfit as reason:
            self.left_out[str(reason)] += 1
            return None

    def check(self):
        """Raise DataError if there were records with prompts and none had a column of answers."""
        if self._first and not self._answers:
            raise DataError(self._first)

    def remarks(self):
        """What was done to rows besides leaving some out, as lines of text."""
        lines = []
        if self._talks:
            lines.append(
                f"of {self._talks} conversations the first exchange is the row,"
                f" {self._later} later turns are not used"
            )
        if self._systems:
            lines.append(f"{self._systems} system messages stand in front of their prompts")
        if self._unused:
            names = [f"{name} ({n})" for name, n in self._unused.most_common(12)]
            more = f" and {len(self._unused) - 12} more" if len(self._unused) > 12 else ""
            lines.append(f"not used: {', '.join(names)}{more}")
        return lines

    # ------------------------------------------------------------------------------ a record

    def _texts(self, record, where):
        if any(not blank(record.get(name)) for name in CALLS):
            raise Unfit(NO_TOOLS)
        if any(not blank(record.get(name)) for name in MEDIA):
            raise Unfit(ONLY_TEXT)
        if not blank(record.get("history")):
            raise Unfit(NO_HISTORY)
        _require_weight(record, where, WEIGHTS[:2])
        talk = next((name for name in TALKS if not blank(record.get(name))), None)
        prompt = next((name for name in PROMPTS if name in record), None)
        answer = next((name for name in ANSWERS if name in record), None)
        if not (talk or answer) and self._first is None:
            self._first = f"{where}: has columns {_names(record)}; wanted: {WANTED}"
        system = _given(record, SYSTEMS)
        used = {talk, prompt, answer, system, "id", *CALLS, *MEDIA, *WEIGHTS, "history"}
        if talk:
            used -= {prompt, answer}
            texts = self._first_exchange(record[talk], talk, where)
        elif prompt and isinstance(record[prompt], list):  # TRL's prompt and completion
            texts = self._first_exchange(_joined(record, prompt, answer, where), prompt, where)
        elif prompt:
            texts, more = self._columns(record, prompt, answer, where)
            used.add(more)
        elif any(name in record for name in TALKS):
            texts = "", ""
        else:
            raise DataError(f"{where}: has columns {_names(record)}; wanted: {WANTED}")
        self._answers += bool(answer or talk)
        unused = [name for name in record if name not in used and not blank(record[name])]
        self._unused.update(unused)
        if system:
            self._systems += 1
            texts = f"{text_of(record[system], system, where)}\n\n{texts[0]}", texts[1]
        return texts

    def _columns(self, record, prompt, answer, where):
        """(prompt, answer) of plain columns, and the name of the column of the input, if any."""
        more = _given(record, INPUTS)
        asked = text_of(record[prompt], prompt, where)
        if more:
            asked += INPUT + text_of(record[more], more, where)
        return (asked, text_of(record.get(answer), answer, where)), more

    def _first_exchange(self, turns, column, where):
        """(prompt, answer) of a conversation: its system messages and first user turn, and what
        the assistant says to that."""
        turns = _unpacked(turns)
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise DataError(f"{where}: {column} must be a list of {{role, content}} objects")
        turns = [_lower(turn) for turn in turns]
        roles = [_role(turn, where) for turn in turns]
        if "tool" in roles or any(not blank(turn.get(name)) for turn in turns for name in CALLS):
            raise Unfit(NO_TOOLS)
        start = next((i for i, role in enumerate(roles) if role != "system"), len(turns))
        if roles[start:] and roles[start : start + 2] not in (["user"], ["user", "assistant"]):
            raise Unfit(IN_ORDER)
        first = turns[: start + 2]
        if len(roles) > start + 1:
            _require_weight(first[-1], where)
        texts = [_content(turn, where) for turn in first]
        known = ("role", "from", "content", "value", *CALLS, *WEIGHTS)
        extra = [k for turn in first for k, v in turn.items() if k not in known and not blank(v)]
        self._unused.update(f"{column}.{name}" for name in dict.fromkeys(extra))
        self._systems += start > 0
        later = len(turns) - len(first)
        self._talks, self._later = self._talks + (later > 0), self._later + later
        if len(roles) <= start + 1:  # no answer
            return "\n\n".join(texts), ""
        return "\n\n".join(texts[:-1]), texts[-1]


# --------------------------------------------------------------------------------------- parts


def blank(value):
    """Whether a value says nothing: none, not a number, empty, or made of such."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null", "None")
    if isinstance(value, dict):
        return all(blank(one) for one in value.values())
    if isinstance(value, list | tuple):
        return all(blank(one) for one in value)
    return value is None or (isinstance(value, float) and math.isnan(value))


def _unpacked(turns):
    """Turns out of the forms that tables give them: JSON in a cell, or a list for each key."""
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):  # else refused as text
            turns = json.loads(turns)
    if isinstance(turns, dict) and all(isinstance(one, list) for one in turns.values()):
        with contextlib.suppress(ValueError):
            columns = zip(*turns.values(), strict=True)
            turns = [dict(zip(turns, each, strict=True)) for each in columns]
    return turns


def _lower(record):
    return {str(name).strip().lower(): value for name, value in record.items()}


def _given(record, names):
    """The first of these columns that holds more than space."""
    empty = (None, "")
    return next((n for n in names if _stripped(record.get(n)) not in empty), None)


def _stripped(value):
    return value.strip() if isinstance(value, str) else None if blank(value) else value


def text_of(value, column, where):
    """A value as text: a number is one, and nothing is the empty text. Raises DataError."""
    if isinstance(value, str):
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, Decimal):
        return str(value)
    raise DataError(f"{where}: {column} is {type(value).__name__}; wanted: text")


def _content(turn, where):
    """Text of a turn, which may come as a list of parts."""
    column = "value" if turn.get("content") is None and "value" in turn else "content"
    value = turn.get(column)
    if not isinstance(value, list):
        return text_of(value, column, where)
    texts = []
    for part in value:
        if isinstance(part, dict):
            kind = str(part.get("type") or "text")
            if "tool" in kind or "function" in kind:
                raise Unfit(NO_TOOLS)
            if kind not in ("text", "input_text", "output_text"):
                raise Unfit(ONLY_TEXT)
            part = part.get("text")
        texts.append(text_of(part, f"a part of {column}", where))
    return "".join(texts)


def _joined(record, prompt, answer, where):
    """The turns of a prompt and of its completion, which must be the first answer."""
    asked, answered = record[prompt], record.get(answer)
    if not isinstance(answered, list):
        text = text_of(answered, answer, where)
        answered = [{"role": "assistant", "content": text}] if text else []
    turns = [*asked, *answered]
    whole = all(isinstance(turn, dict) for turn in turns)  # else refused with the others
    if whole and "assistant" in [_role(_lower(turn), where) for turn in asked]:
        raise Unfit(NO_HISTORY)
    return turns


def _role(turn, where):
    """system, user, assistant or tool, by any of the names that they go by."""
    name = turn.get("from") if turn.get("role") is None else turn["role"]
    known = ROLES.get(str(name).strip().lower().replace("-", "_").replace(" ", "_"))
    if known is None:
        raise DataError(
            f"{where}: role {name!r} is unknown; wanted: system, user, assistant or their kin"
            " (developer, human, gpt, model, tool)"
        )
    return known


def _require_weight(holder, where, names=WEIGHTS):
    """Unfit for an answer that is not to be trained on, DataError for half a one."""
    for name in names:
        value = holder.get(name)
        if blank(value):
            continue
        try:
            number = {"true": 1, "false": 0}.get(str(value).lower(), value)
            weight = float(number)
        except (TypeError, ValueError):
            weight = None
        if weight not in (0, 1):
            raise DataError(f"{where}: {name} is {value!r}; wanted: 0 (left out) or 1")
        if weight == 0:
            raise Unfit(TRAINED)


def _names(record):
    names = [str(name)[:40] for name in record]
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(names[:12]) + more or "none"
