"""Question and answer under separate keys: Alpaca, query/response, prompt/completion, and lists of pairs.

```json
{"instruction": "Name the shape.", "input": "three sides", "output": "triangle"}
{"query": "<image>And this?", "response": "A square.", "history": [["What is it?", "A circle."]], "images": ["a.png"]}
{"texts": [{"user": "What is it?", "assistant": "A circle."}], "images": ["a.png"]}
```
They become ``messages``. If no question has a media tag, all media go before the first question.
"""

from typing import Any

from qwenvl_ft.data.conversation import Source
from qwenvl_ft.data.readers.media_pool import TAGS
from qwenvl_ft.errors import DataError

FORMS = (
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("query", "", "response"),
    ("prompt", "", "completion"),
    ("prompt", "", "response"),
    ("question", "", "answer"),
)
"""Keys of the question, of its optional second part, and of the answer."""
LISTS = {
    "texts": ("user", "assistant"),
    "conversation": ("human", "assistant"),
}
"""Key of a list of pairs -> keys of question and answer in a pair."""
MEDIA_KEYS = {"<image>": ("image", "images"), "<video>": ("video", "videos")}

Pair = tuple[str, str, dict[str, Any]]
"""(question, answer, other keys of the pair, which become the answer's)"""


def matches(record: dict[str, Any]) -> bool:
    return _form(record) is not None or _list_key(record) is not None


def rewrite(record: dict[str, Any], source: Source, media_root: str | None) -> dict[str, Any]:
    """Return the record as ``messages``; its other keys (tools, media, id) are kept.

    Raises:
        DataError: a question or an answer is not a text, or ``history`` is not a list of pairs.
    """
    form = _form(record)
    pairs, used = _pairs_of_form(record, form, source) if form else _pairs_of_list(record, source)
    messages: list[dict[str, Any]] = []
    if record.get("system"):
        messages.append({"role": "system", "content": record["system"]})
    for question, answer, others in pairs:
        messages += [{"role": "user", "content": question}, others | {"role": "assistant", "content": answer}]
    _add_media_tags(record, messages)
    rest = {key: value for key, value in record.items() if key not in (*used, "system")}
    return rest | {"messages": messages}


def _form(record: dict[str, Any]) -> tuple[str, str, str] | None:
    present = {key for key, value in record.items() if value is not None}
    return next((form for form in FORMS if {form[0], form[2]} <= present), None)


def _list_key(record: dict[str, Any]) -> str | None:
    return next((key for key in LISTS if isinstance(record.get(key), list)), None)


def _pairs_of_form(
    record: dict[str, Any], form: tuple[str, str, str], source: Source
) -> tuple[list[Pair], tuple[str, ...]]:
    """Return the pairs of a record with one question, its history first, and the keys that hold them."""
    question, second_part, answer = form
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in history):
        raise DataError(f"{source}: 'history' must be a list of [question, answer], not {history!r:.80}.")
    pairs: list[Pair] = [(_text(q, f"{source}: history"), _text(a, f"{source}: history"), {}) for q, a in history]
    text = _text(record[question], f"{source}: {question!r}")
    if second_part and record.get(second_part):
        text += "\n" + _text(record[second_part], f"{source}: {second_part!r}")
    return [*pairs, (text, _text(record[answer], f"{source}: {answer!r}"), {})], (*form, "history")


def _pairs_of_list(record: dict[str, Any], source: Source) -> tuple[list[Pair], tuple[str, ...]]:
    """Return the pairs of a record that lists them, and the key of the list."""
    key = _list_key(record)
    assert key is not None, "the record does not match this format"
    question, answer = LISTS[key]
    pairs = []
    for number, pair in enumerate(record[key]):
        where = f"{source}: {key}[{number}]"
        if not isinstance(pair, dict) or not {question, answer} <= pair.keys():
            raise DataError(f"{where} must be {{'{question}': text, '{answer}': text}}, not {pair!r:.80}.")
        others = {name: value for name, value in pair.items() if name not in (question, answer)}
        pairs.append((_text(pair[question], where), _text(pair[answer], where), others))
    return pairs, (key,)


def _text(value: Any, where: str) -> str:
    """Return a question or an answer as text; numbers (0 included) are allowed."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{where} must be a text, not {value!r:.80}.")
    return value


def _add_media_tags(record: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    """Write a tag for each medium before the first question, unless a question has a tag."""
    if any(TAGS.search(message["content"]) for message in messages if message["role"] == "user"):
        return
    counts = {tag: sum(_count(record.get(key)) for key in keys) for tag, keys in MEDIA_KEYS.items()}
    first = next((message for message in messages if message["role"] == "user"), None)
    if first is not None:
        first["content"] = "".join(tag * count for tag, count in counts.items()) + first["content"]


def _count(value: Any) -> int:
    if value is None or value == "":
        return 0
    return len(value) if isinstance(value, (list, tuple)) else 1
