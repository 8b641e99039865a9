"""What does a record hold that nothing reads? Keys that change its meaning are errors; all others are counted.

A record of preference data, of a classifier or with sound would otherwise train as if those keys were absent. Each
reader passes the keys that it reads; `unread_keys` judges the rest.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from qwenvl_ft.errors import DataError

EXAMPLE = 60
"""Characters of a value that a message shows."""


class Unread(NamedTuple):
    """A key that holds something and is read by nothing."""

    path: str
    """``source`` of the record, or ``messages[].name`` of its turns."""
    value: str
    """The value as text, cut to `EXAMPLE` characters."""


class Tally(NamedTuple):
    """How often a key was unread, with its first occurrence."""

    records: int
    example: str
    """``file.jsonl:12: 'value'``"""


@dataclass(frozen=True)
class Meaning:
    """Keys that change what a record means."""

    keys: re.Pattern[str]
    """Matches a whole key in lower case."""
    what: str
    """Completes "KEY=VALUE, which is ..."."""
    remedy: str
    holds: Callable[[Any], bool] = lambda value: True
    """Returns False for values that do not change the meaning."""


def is_empty(value: Any) -> bool:
    """Return True for None and for empty texts, lists and objects; 0 and False hold something."""
    return value is None or (isinstance(value, (str, bytes, list, tuple, dict)) and not value)


def is_false(value: Any) -> bool:
    """Return True for a label that marks a wrong answer: false, 0, or one of them as text (from .csv)."""
    return str(value).strip().lower() in ("false", "0", "0.0")


def is_true(value: Any) -> bool:
    """Return True for a label that marks a right answer, which is what an answer without a label is taken for."""
    return str(value).strip().lower() in ("true", "1", "1.0")


def _is_number(value: Any) -> bool:
    """Return True for a number, its text, or a list of numbers."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_number, value))
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


LABELS = ("label", "kto_tag")
"""Names under which preference data mark an answer as right or wrong."""
WRONG_ANSWER = Meaning(
    re.compile("|".join(LABELS)),
    "the mark of a wrong answer, which would be learned as right",
    "Set data.label=keep_true, which leaves out records with label: false",
    is_false,
)
FILTER = "Filter the records by it before training"
MEANINGS = (
    Meaning(
        re.compile(r"(input_?)?(audio|speech|sound|wav|waveform|point_?cloud)s?(_(path|file|url|byte)s?)?"),
        "a medium that the model has no input for",
        "Drop the record",
        lambda value: value is not False,
    ),
    Meaning(
        re.compile(r"(.+_)?(rejected|(dis|un|non_?|not_)preferred)(_.+)?|negative_(messages|images|videos)"),
        "an answer that preference data reject",
        "Drop the key to train on the turns alone",
    ),
    Meaning(
        re.compile(r"(.+_)?(chosen|preferred)(_.+)?|positive_(messages|images|videos)"),
        "an answer that preference data prefer",
        "Write it as the last assistant turn and drop the key",
    ),
    WRONG_ANSWER,
    Meaning(re.compile(r"margin|scores?|rewards?"), "a judgement of the answer", FILTER, _is_number),
    Meaning(
        re.compile(
            r"((sample|loss|token|turn|message|example|instance|train|training)_?)?(weight|weighting)s?"
            r"|loss|loss_(scale|mask)s?"
        ),
        "a weight that is not applied",
        "Weights are data.loss_weights of a data set, and loss_weight of a turn",
        _is_number,
    ),
)
"""In the order in which they are tried."""
TURN_MEANINGS = (
    Meaning(
        re.compile(r"train|training|trainable|supervised|mask|masked|train_detail"),
        "a choice of what is learned that is not applied",
        "Write loss: false in turns that are context only",
    ),
    replace(WRONG_ANSWER, remedy="Write loss: false in this turn"),
    Meaning(
        re.compile("(image|video)s?"),
        "a medium that the model would not see: nothing reads media of a turn",
        "Write it among the record's images or videos, and its tag in the text",
    ),
)
"""Keys that change the meaning of a turn; tried before `MEANINGS`."""
TEXT_PART_MEANINGS = (
    Meaning(
        re.compile("(image|video)(_url)?"),
        "a medium that the model would not see: its part is of type text",
        "Write it as a part of its own",
    ),
)
"""Keys that change the meaning of a part of type text; tried before `MEANINGS`."""
MEDIA = re.compile(
    r"(img|picture|photo|frame)s?|(image|img|picture|photo|video|frame)s?_(path|file|url|list|(file)?name)s?"
)
"""Other names of pictures and videos; an error in a record whose conversation shows none."""


def unread_keys(
    entry: Mapping[str, Any], known: Collection[str], where: Any, path: str = "", meanings: Iterable[Meaning] = MEANINGS
) -> list[Unread]:
    """Return the keys of a record, a turn or a part that hold something and are not in ``known``.

    Args:
        where: the place for messages: file, line and turn.
        path: prefix of the keys of a turn or part, such as ``messages[].``.

    Raises:
        DataError: one of these keys changes what the record means.
    """
    found: list[Unread] = []
    for key, value in entry.items():
        if key in known or is_empty(value):
            continue
        name = str(key)
        for meaning in meanings:
            if meaning.keys.fullmatch(name.lower()) and meaning.holds(value):
                raise DataError(_described(where, name, value, meaning.what, meaning.remedy))
        if not (name.lower() in LABELS and is_true(value)):
            found.append(Unread(f"{path}{name}", f"{value!r:.{EXAMPLE}}"))
    return found


def require_media_read(record: Mapping[str, Any], known: Collection[str], where: Any) -> None:
    """Raise DataError if a record that shows no medium names one under a key that nothing reads."""
    for key, value in record.items():
        if (
            key not in known
            and MEDIA.fullmatch(str(key).lower())
            and not is_empty(value)
            and not isinstance(value, bool)
        ):
            kind = "videos" if str(key).lower().startswith(("video", "frame")) else "images"
            what = "no name of a medium here, so the model would not see it"
            raise DataError(_described(where, str(key), value, what, f"Write {kind}: [path], and its tag in the text"))


def _described(where: Any, key: str, value: Any, what: str, remedy: str) -> str:
    return (
        f"{where}: {key}={value!r:.{EXAMPLE}} is {what}. {remedy}, or set data.ignored_keys=[{key}] to train as if it "
        "were absent."
    )


def once(unread: Iterable[Unread]) -> tuple[Unread, ...]:
    """Return the first of each key, for a record in which several turns or objects have it."""
    return tuple({entry.path: entry for entry in reversed(list(unread))}.values())


def tally(into: dict[str, Tally], unread: Iterable[Unread], where: str) -> None:
    """Count unread keys.

    Args:
        where: the record or group that has them.
    """
    for path, value in unread:
        count, example = into.get(path, Tally(0, f"{where}: {value}"))
        into[path] = Tally(count + 1, example)


def tally_lines(counted: Mapping[str, Tally]) -> list[str]:
    """Return one line for each unread key, the most frequent first."""
    ordered = sorted(counted.items(), key=lambda entry: (-entry[1].records, entry[0]))
    return [
        f"nothing reads the key {path!r} ({count:,} record{'s' * (count != 1)}), e.g. {example}"
        for path, (count, example) in ordered
    ]
