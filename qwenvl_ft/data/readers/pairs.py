"""Questions and answers under keys of their own: Alpaca, query and response, prompt and completion, lists of pairs.

```json
{"instruction": "Name the shape.", "input": "three sides", "output": "triangle"}
{"query": "<image>And this?", "response": "A square.", "history": [["What is it?", "A circle."]], "images": ["a.png"]}
{"texts": [{"user": "What is it?", "assistant": "A circle."}], "images": ["a.png"]}
```
They become ``messages``. Media that no text has a tag for stand before the first question, if no text has any tag.
"""

from typing import Any

from qwenvl_ft.data.conversation import Source
from qwenvl_ft.data.readers.conversations import TAGS
from qwenvl_ft.errors import DataError

FORMS = (
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("query", "", "response"),
    ("prompt", "", "completion"),
    ("prompt", "", "response"),
    ("question", "", "answer"),
)
"""Keys of a question, of a second part of it (which may be absent) and of the answer."""
LISTS = {
    "texts": ("user", "assistant"),
    "conversation": ("human", "assistant"),
}
"""Key of a list of pairs -> the keys of one pair."""
MEDIA = {"<image>": ("image", "images"), "<video>": ("video", "videos")}

Pair = tuple[Any, Any]


def matches(record: dict[str, Any]) -> bool:
    return _form(record) is not None or _listed(record) is not None


def rewrite(record: dict[str, Any], source: Source, media_root: str | None) -> dict[str, Any]:
    """The record as ``messages``; what is said for all of it (tools, media, id) stays.

    Raises:
        DataError: a question or an answer is no text, or ``history`` is no list of pairs.
    """
    form = _form(record)
    pairs, used = _one(record, form, source) if form else _several(record, source)
    messages: list[dict[str, Any]] = []
    if record.get("system"):
        messages.append({"role": "system", "content": record["system"]})
    for question, answer in pairs:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    _show_media(record, messages)
    rest = {key: value for key, value in record.items() if key not in (*used, "system", "history")}
    return rest | {"messages": messages}


def _form(record: dict[str, Any]) -> tuple[str, str, str] | None:
    told = {key for key, value in record.items() if value is not None}
    return next((form for form in FORMS if {form[0], form[2]} <= told), None)


def _listed(record: dict[str, Any]) -> str | None:
    return next((key for key in LISTS if isinstance(record.get(key), list)), None)


def _one(record: dict[str, Any], form: tuple[str, str, str], source: Source) -> tuple[list[Pair], tuple[str, ...]]:
    question, more, answer = form
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in history):
        raise DataError(f"{source}: 'history' must be a list of [question, answer], it is {history!r:.80}.")
    pairs = [(_text(q, f"{source}: history"), _text(a, f"{source}: history")) for q, a in history]
    asked = _text(record[question], f"{source}: {question!r}")
    if more and record.get(more):
        asked += "\n" + _text(record[more], f"{source}: {more!r}")
    return [*pairs, (asked, _text(record[answer], f"{source}: {answer!r}"))], form


def _several(record: dict[str, Any], source: Source) -> tuple[list[Pair], tuple[str, ...]]:
    key = _listed(record)
    assert key is not None, "asked for a record that does not match"
    question, answer = LISTS[key]
    pairs = []
    for number, pair in enumerate(record[key]):
        where = f"{source}: {key}[{number}]"
        if not isinstance(pair, dict) or not {question, answer} <= pair.keys():
            raise DataError(f"{where} must be {{'{question}': text, '{answer}': text}}, it is {pair!r:.80}.")
        pairs.append((_text(pair[question], where), _text(pair[answer], where)))
    return pairs, (key,)


def _text(value: Any, where: str) -> str:
    """Answers may be numbers, 0 included."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{where} must be a text, it is {value!r:.80}.")
    return value


def _show_media(record: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    """Write a tag for each medium before the first question, where no text has one."""
    if any(TAGS.search(message["content"]) for message in messages if message["role"] == "user"):
        return
    counts = {tag: sum(_count(record.get(key)) for key in keys) for tag, keys in MEDIA.items()}
    first = next((message for message in messages if message["role"] == "user"), None)
    if first is not None:
        first["content"] = "".join(tag * count for tag, count in counts.items()) + first["content"]


def _count(value: Any) -> int:
    if value is None or value == "":
        return 0
    return len(value) if isinstance(value, (list, tuple)) else 1
