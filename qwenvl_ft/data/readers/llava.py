"""LLaVA's video data sets, which write ``<image>`` in the text where the record's ``video`` belongs.

```json
{"id": 1, "video": "a.mp4", "conversations": [{"from": "human", "value": "<image>\nWhat falls?"},
                                              {"from": "gpt", "value": "A cup."}]}
```
LLaVA's image data sets are plain ``conversations``.
"""

from typing import Any

from qwenvl_ft.data.conversation import Source
from qwenvl_ft.data.readers.media_pool import TAGS


def matches(record: dict[str, Any]) -> bool:
    turns = record.get("conversations")
    if not (record.get("video") or record.get("videos")) or record.get("image") or record.get("images"):
        return False
    if not isinstance(turns, list):
        return False
    text = "".join(str(turn.get("value")) for turn in turns if isinstance(turn, dict))
    return set(TAGS.findall(text)) == {"<image>"}


def rewrite(record: dict[str, Any], source: Source, media_root: str | None) -> dict[str, Any]:
    """Return the record with each ``<image>`` tag replaced by ``<video>``."""
    turns = [
        turn | {"value": TAGS.sub("<video>", turn["value"])}
        if isinstance(turn, dict) and isinstance(turn.get("value"), str)
        else turn
        for turn in record["conversations"]
    ]
    return record | {"conversations": turns}
